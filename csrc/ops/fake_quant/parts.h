// A weight as the kernels take it, made from tensors.
#pragma once

#include "ops/fake_quant/arguments.h"
#include "ops/fake_quant/kernels.h"

namespace grace::fake_quant {

template <typename T, typename O = T>
Part<T, O> forward_part(const Tensor& weight, const Tensor& log_scale, const Tensor& out) {
  const int64_t groups = log_scale.numel();
  const int64_t size = groups == 0 ? 0 : weight.size(1) / log_scale.size(1);
  return {data<const T>(weight),
          data<const float>(log_scale),
          nullptr,
          out.data_ptr(),
          nullptr,
          size == 0 ? 0 : groups,
          static_cast<int>(size),
          shift_of<T>(static_cast<int>(size))};
}

template <typename T, typename O = T>
Part<T, O> backward_part(const Tensor& grad, const Tensor& weight, const Tensor& log_scale,
                         const Tensor& grad_weight, const Tensor& grad_log_scale) {
  Part<T, O> part = forward_part<T, O>(weight, log_scale, grad_weight);
  part.grad = data<const O>(grad);
  part.grad_log_scale = data<float>(grad_log_scale);
  return part;
}

}  // namespace grace::fake_quant
