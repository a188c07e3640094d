// fake_quant_many on CUDA: the kernels of fake_quant with up to kMost weights a launch.
#include <algorithm>
#include <array>
#include <vector>

#include "ops/fake_quant/parts.h"

namespace grace::fake_quant {
namespace {

constexpr int kMost = 64;  // weights a launch: their table still fits 4 KB of kernel arguments
constexpr int kWays = 3;

using Tensors = std::vector<Tensor>;

// Parts that go the same way share launches.
template <typename T>
class Launches {
 public:
  void add(const Part<T>& part) {
    if (part.groups > 0) parts_[static_cast<size_t>(way_of(part))].push_back(part);
  }

  void run(Codes codes, ScaleGrid grid, int device) const {
    for (int way = 0; way < kWays; ++way) {
      const auto& parts = parts_[static_cast<size_t>(way)];
      for (size_t first = 0; first < parts.size(); first += kMost) {
        const int count = static_cast<int>(std::min<size_t>(kMost, parts.size() - first));
        launch_parts<kMost>(&parts[first], count, static_cast<Way>(way), codes, grid, device);
      }
    }
  }

 private:
  std::array<std::vector<Part<T>>, kWays> parts_;
};

Tensors empty_like(const Tensors& tensors) {
  Tensors made;
  for (const Tensor& tensor : tensors) made.push_back(torch::stable::empty_like(tensor));
  return made;
}

// Calls part(i, element), for all i, and launches what it makes.
template <typename F>
void launch_all(const Tensors& weights, int64_t bits, std::optional<ScalarType> scale_dtype,
                F&& part) {
  if (weights.empty()) return;
  const ScalarType dtype = weights[0].scalar_type();
  dispatch_floating(dtype, "fake_quant_many", [&](auto element) {
    Launches<decltype(element)> launches;
    for (size_t i = 0; i < weights.size(); ++i) {
      STD_TORCH_CHECK(weights[i].scalar_type() == dtype,
                      "fake_quant_many: weights must have one dtype");
      launches.add(part(i, element));
    }
    launches.run(codes_of(static_cast<int>(bits)), grid_of(scale_dtype), device_of(weights[0]));
  });
}

// Weights [N, K] of one dtype and log-scales fp32 [N, K / group_size], contiguous: checked in
// Python.
Tensors fake_quant_many_cuda(Tensors weights, Tensors log_scales, int64_t bits,
                             int64_t /*group_size*/, std::optional<ScalarType> scale_dtype) {
  STD_TORCH_CHECK(weights.size() == log_scales.size(),
                  "fake_quant_many: log_scales must be as many as weights");
  Tensors out = empty_like(weights);
  launch_all(weights, bits, scale_dtype, [&](size_t i, auto element) {
    return forward_part<decltype(element)>(weights[i], log_scales[i], out[i]);
  });
  return out;
}

std::tuple<Tensors, Tensors> fake_quant_many_backward_cuda(Tensors grads, Tensors weights,
                                                           Tensors log_scales, int64_t bits,
                                                           int64_t /*group_size*/,
                                                           std::optional<ScalarType> scale_dtype) {
  STD_TORCH_CHECK(weights.size() == log_scales.size() && weights.size() == grads.size(),
                  "fake_quant_many: log_scales and grads must be as many as weights");
  Tensors grad_weights = empty_like(weights), grad_log_scales = empty_like(log_scales);
  launch_all(weights, bits, scale_dtype, [&](size_t i, auto element) {
    return backward_part<decltype(element)>(grads[i], weights[i], log_scales[i], grad_weights[i],
                                            grad_log_scales[i]);
  });
  return {grad_weights, grad_log_scales};
}

}  // namespace
}  // namespace grace::fake_quant

GRACE_CUDA_KERNELS(m) {
  m.impl("fake_quant_many", TORCH_BOX(&grace::fake_quant::fake_quant_many_cuda));
  m.impl("fake_quant_many_backward", TORCH_BOX(&grace::fake_quant::fake_quant_many_backward_cuda));
}
