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
template <typename T, typename O>
class Launches {
 public:
  void add(const Part<T, O>& part) {
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
  std::array<std::vector<Part<T, O>>, kWays> parts_;
};

Tensors empty_like(const Tensors& tensors) {
  Tensors made;
  for (const Tensor& tensor : tensors) made.push_back(torch::stable::empty_like(tensor));
  return made;
}

// Calls f with values of the weights' type and of the type they are quantized to.
template <typename F>
void dispatch_types(ScalarType weight, ScalarType quantized, F&& f) {
  if (weight == quantized)
    return dispatch_floating(weight, "fake_quant_many", [&](auto type) { f(type, type); });
  STD_TORCH_CHECK(weight == ScalarType::Float,
                  "fake_quant_many: dtype must be that of the weights where they are not float32");
  dispatch_floating(quantized, "fake_quant_many", [&](auto type) { f(float{}, type); });
}

// Calls part(i, T, O) for all i, with values of both types, and launches what it makes.
template <typename F>
void launch_all(const Tensors& weights, ScalarType quantized, int64_t bits,
                std::optional<ScalarType> scale_dtype, F&& part) {
  if (weights.empty()) return;
  const ScalarType dtype = weights[0].scalar_type();
  dispatch_types(dtype, quantized, [&](auto of_weight, auto of_quantized) {
    Launches<decltype(of_weight), decltype(of_quantized)> launches;
    for (size_t i = 0; i < weights.size(); ++i) {
      STD_TORCH_CHECK(weights[i].scalar_type() == dtype,
                      "fake_quant_many: weights must have one dtype");
      launches.add(part(i, of_weight, of_quantized));
    }
    launches.run(codes_of(static_cast<int>(bits)), grid_of(scale_dtype), device_of(weights[0]));
  });
}

// Weights [N, K] of one dtype and log-scales fp32 [N, K / group_size], contiguous: checked in
// Python. The quantized weights are of `dtype`: that of the weights, or 16 bits for float32 ones.
Tensors fake_quant_many_to_cuda(Tensors weights, Tensors log_scales, int64_t bits,
                                int64_t /*group_size*/, std::optional<ScalarType> scale_dtype,
                                ScalarType dtype) {
  STD_TORCH_CHECK(weights.size() == log_scales.size(),
                  "fake_quant_many: log_scales must be as many as weights");
  Tensors out;
  for (const Tensor& weight : weights)
    out.push_back(torch::stable::new_empty(weight, weight.sizes(), dtype));
  launch_all(weights, dtype, bits, scale_dtype, [&](size_t i, auto of_weight, auto of_out) {
    return forward_part<decltype(of_weight), decltype(of_out)>(weights[i], log_scales[i], out[i]);
  });
  return out;
}

Tensors fake_quant_many_cuda(Tensors weights, Tensors log_scales, int64_t bits, int64_t group_size,
                             std::optional<ScalarType> scale_dtype) {
  const ScalarType dtype = weights.empty() ? ScalarType::Float : weights[0].scalar_type();
  return fake_quant_many_to_cuda(weights, log_scales, bits, group_size, scale_dtype, dtype);
}

// Gradients of one dtype: that of the quantized weights.
std::tuple<Tensors, Tensors> fake_quant_many_backward_cuda(Tensors grads, Tensors weights,
                                                           Tensors log_scales, int64_t bits,
                                                           int64_t /*group_size*/,
                                                           std::optional<ScalarType> scale_dtype) {
  STD_TORCH_CHECK(weights.size() == log_scales.size() && weights.size() == grads.size(),
                  "fake_quant_many: log_scales and grads must be as many as weights");
  Tensors grad_weights = empty_like(weights), grad_log_scales = empty_like(log_scales);
  if (weights.empty()) return {grad_weights, grad_log_scales};
  const ScalarType quantized = grads[0].scalar_type();
  launch_all(weights, quantized, bits, scale_dtype, [&](size_t i, auto of_weight, auto of_grad) {
    STD_TORCH_CHECK(grads[i].scalar_type() == quantized,
                    "fake_quant_many: grads must have one dtype");
    return backward_part<decltype(of_weight), decltype(of_grad)>(
        grads[i], weights[i], log_scales[i], grad_weights[i], grad_log_scales[i]);
  });
  return {grad_weights, grad_log_scales};
}

}  // namespace
}  // namespace grace::fake_quant

GRACE_CUDA_KERNELS(m) {
  m.impl("fake_quant_many", TORCH_BOX(&grace::fake_quant::fake_quant_many_cuda));
  m.impl("fake_quant_many_to", TORCH_BOX(&grace::fake_quant::fake_quant_many_to_cuda));
  m.impl("fake_quant_many_backward", TORCH_BOX(&grace::fake_quant::fake_quant_many_backward_cuda));
}
