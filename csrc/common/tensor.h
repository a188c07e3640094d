// What every op's C++ file needs of torch: the stable tensor, dtype dispatch, registration.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/numeric.h"

namespace grace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the element type that `dtype` names: float, bf16 or fp16.
template <typename F>
void dispatch_floating(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16 or float16");
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace grace

// Registers an op's C++ kernels: GRACE_CPU_KERNELS(m) { m.impl("<op>", TORCH_BOX(&<op>_cpu)); }
#define GRACE_CPU_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(grace, CPU, m)
#if defined(GRACE_EMULATE)
#define GRACE_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(grace_emulated, CPU, m)
#else
#define GRACE_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(grace, CUDA, m)
#endif
