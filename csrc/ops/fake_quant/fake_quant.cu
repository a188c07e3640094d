// fake_quant on CUDA: a warp a group, forward and backward.
#include "common/launch.h"
#include "common/warp.h"
#include "ops/fake_quant/arguments.h"
#include "ops/fake_quant/fake_quant.h"

namespace grace::fake_quant {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    fake_quant_kernel(const T* weight,         // [groups, group_size]
                      const float* log_scale,  // [groups]
                      T* out,                  // [groups, group_size]
                      int64_t groups, int group_size, int bits, ScaleGrid grid) {
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (group >= groups) return;
  const float scale = scale_of(log_scale[group], grid);
  const Codes codes = codes_of(bits);
  for (int i = threadIdx.x % kWarpSize; i < group_size; i += kWarpSize) {
    const int64_t at = group * group_size + i;
    out[at] = from_float<T>(fake_quantize(to_float(weight[at]), scale, codes));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    fake_quant_backward_kernel(const T* grad,           // [groups, group_size]
                               const T* weight,         // [groups, group_size]
                               const float* log_scale,  // [groups]
                               T* grad_weight,          // [groups, group_size]
                               float* grad_log_scale,   // [groups]
                               int64_t groups, int group_size, int bits, ScaleGrid grid) {
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (group >= groups) return;
  const float scale = scale_of(log_scale[group], grid);
  const Codes codes = codes_of(bits);
  float sum = 0.0f;
  for (int i = threadIdx.x % kWarpSize; i < group_size; i += kWarpSize) {
    const int64_t at = group * group_size + i;
    const Gradient g = gradient_of(to_float(grad[at]), to_float(weight[at]), scale, codes);
    grad_weight[at] = from_float<T>(g.weight);
    sum += g.log_scale;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) grad_log_scale[group] = sum;
}

int group_length(const Tensor& weight, const Tensor& log_scale) {
  return log_scale.size(1) == 0 ? 0 : static_cast<int>(weight.size(1) / log_scale.size(1));
}

LaunchShape shape_for(int64_t groups) {
  return {dim3(ceil_div<int64_t>(groups, kWarps)), kThreads};
}

// weight [N, K] and log_scale fp32 [N, K / group_size], contiguous: checked in Python.
Tensor fake_quant_cuda(const Tensor& weight, const Tensor& log_scale, int64_t bits,
                       int64_t /*group_size*/, std::optional<ScalarType> scale_dtype) {
  Tensor out = torch::stable::empty_like(weight);
  const int64_t groups = log_scale.numel();
  if (groups == 0) return out;
  const ScaleGrid grid = grid_of(scale_dtype);
  dispatch_floating(weight.scalar_type(), "fake_quant", [&](auto element) {
    using T = decltype(element);
    launch(fake_quant_kernel<T>, shape_for(groups), device_of(weight), data<T>(weight),
           data<float>(log_scale), data<T>(out), groups, group_length(weight, log_scale),
           static_cast<int>(bits), grid);
  });
  return out;
}

std::tuple<Tensor, Tensor> fake_quant_backward_cuda(const Tensor& grad, const Tensor& weight,
                                                    const Tensor& log_scale, int64_t bits,
                                                    int64_t /*group_size*/,
                                                    std::optional<ScalarType> scale_dtype) {
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_log_scale = torch::stable::empty_like(log_scale);
  const int64_t groups = log_scale.numel();
  if (groups == 0) return {grad_weight, grad_log_scale};
  const ScaleGrid grid = grid_of(scale_dtype);
  dispatch_floating(weight.scalar_type(), "fake_quant", [&](auto element) {
    using T = decltype(element);
    launch(fake_quant_backward_kernel<T>, shape_for(groups), device_of(weight), data<T>(grad),
           data<T>(weight), data<float>(log_scale), data<T>(grad_weight),
           data<float>(grad_log_scale), groups, group_length(weight, log_scale),
           static_cast<int>(bits), grid);
  });
  return {grad_weight, grad_log_scale};
}

}  // namespace
}  // namespace grace::fake_quant

GRACE_CUDA_KERNELS(m) {
  m.impl("fake_quant", TORCH_BOX(&grace::fake_quant::fake_quant_cuda));
  m.impl("fake_quant_backward", TORCH_BOX(&grace::fake_quant::fake_quant_backward_cuda));
}
