// fake_quant on CUDA: a weight is a batch of one part (kernels.h).
#include "ops/fake_quant/arguments.h"
#include "ops/fake_quant/parts.h"

namespace grace::fake_quant {
namespace {

template <typename T>
void launch_part(const Part<T, T>& part, int64_t bits, std::optional<ScalarType> scale_dtype,
                 int device) {
  if (part.groups == 0) return;
  const Codes codes = codes_of(static_cast<int>(bits));
  launch_parts<1>(&part, 1, way_of(part), codes, grid_of(scale_dtype), device);
}

// weight [N, K] and log_scale fp32 [N, K / group_size], contiguous: checked in Python.
Tensor fake_quant_cuda(const Tensor& weight, const Tensor& log_scale, int64_t bits,
                       int64_t /*group_size*/, std::optional<ScalarType> scale_dtype) {
  Tensor out = torch::stable::empty_like(weight);
  dispatch_floating(weight.scalar_type(), "fake_quant", [&](auto element) {
    const auto part = forward_part<decltype(element)>(weight, log_scale, out);
    launch_part(part, bits, scale_dtype, device_of(weight));
  });
  return out;
}

std::tuple<Tensor, Tensor> fake_quant_backward_cuda(const Tensor& grad, const Tensor& weight,
                                                    const Tensor& log_scale, int64_t bits,
                                                    int64_t /*group_size*/,
                                                    std::optional<ScalarType> scale_dtype) {
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_log_scale = torch::stable::empty_like(log_scale);
  dispatch_floating(weight.scalar_type(), "fake_quant", [&](auto element) {
    const auto part =
        backward_part<decltype(element)>(grad, weight, log_scale, grad_weight, grad_log_scale);
    launch_part(part, bits, scale_dtype, device_of(weight));
  });
  return {grad_weight, grad_log_scale};
}

}  // namespace
}  // namespace grace::fake_quant

GRACE_CUDA_KERNELS(m) {
  m.impl("fake_quant", TORCH_BOX(&grace::fake_quant::fake_quant_cuda));
  m.impl("fake_quant_backward", TORCH_BOX(&grace::fake_quant::fake_quant_backward_cuda));
}
