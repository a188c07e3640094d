// One call of dequant_gemm as its kernels take it, made from tensors. Python has raised ValueErrors
// for bad arguments already; what is checked here keeps a kernel inside its tensors.
#pragma once

#include <vector>

#include "common/tensor.h"
#include "ops/dequant_gemm/dequant_gemm.h"

namespace grace::dequant_gemm {

struct Arguments {
  const Tensor& x;        // [..., k]
  const Tensor& qweight;  // int32 [n_tiles, k_tiles, words of a tile]
  const Tensor& scales;   // [groups, 64 * n_tiles]
  const std::optional<Tensor>& bias;
  int64_t bits, group_size, out_features;
  const std::optional<Tensor>& residual;  // [..., columns of the output]
  bool swiglu;
  bool settled;  // the weight may be read while the kernel ahead still runs
};

inline Problem problem_of(const Arguments& a) {
  Problem p;
  p.k = a.x.size(a.x.dim() - 1);
  STD_TORCH_CHECK(p.k > 0, "dequant_gemm: x must have at least one feature");
  p.m = a.x.numel() / p.k;
  p.n = a.out_features;
  p.n_tiles = (p.n + kTile - 1) / kTile;
  p.k_tiles = (p.k + kTile - 1) / kTile;
  const bool one_group = a.group_size == -1 || a.group_size == p.k;
  p.group_size = one_group ? p.k_tiles * kTile : a.group_size;
  STD_TORCH_CHECK(p.group_size > 0, "dequant_gemm: group_size must be positive or -1");
  return p;
}

inline void check_tensors(const Arguments& a, const Problem& p) {
  STD_TORCH_CHECK(a.bits == 4 || a.bits == 8, "dequant_gemm: bits must be 4 or 8");
  STD_TORCH_CHECK(a.qweight.scalar_type() == ScalarType::Int && a.qweight.dim() == 3 &&
                      a.qweight.size(0) == p.n_tiles && a.qweight.size(1) == p.k_tiles &&
                      a.qweight.size(2) == 128 * a.bits,
                  "dequant_gemm: qweight must be what grace.packing.pack makes of [N, K]");
  STD_TORCH_CHECK(a.scales.dim() == 2 && a.scales.size(0) == p.groups() &&
                      a.scales.size(1) == p.n_tiles * kTile,
                  "dequant_gemm: scales must be what grace.packing.pack makes of [N, G]");
  STD_TORCH_CHECK(!a.bias || (a.bias->scalar_type() == a.x.scalar_type() && a.bias->dim() == 1 &&
                              a.bias->size(0) == p.n),
                  "dequant_gemm: bias must be [N] in x's dtype");
  STD_TORCH_CHECK(!a.swiglu || p.n % kBand == 0,
                  "dequant_gemm: out_features must be a multiple of 16 with swiglu");
  STD_TORCH_CHECK(!a.residual || (a.residual->scalar_type() == a.x.scalar_type() &&
                                  a.residual->numel() == p.m * (a.swiglu ? p.n / 2 : p.n) &&
                                  a.residual->is_contiguous()),
                  "dequant_gemm: residual must be like the output, contiguous");
  STD_TORCH_CHECK(a.x.is_contiguous() && a.qweight.is_contiguous() && a.scales.is_contiguous() &&
                      (!a.bias || a.bias->is_contiguous()),
                  "dequant_gemm: tensors must be contiguous");
}

inline Tensor output_of(const Arguments& a) {
  const auto sizes = a.x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = a.swiglu ? a.out_features / 2 : a.out_features;
  return torch::stable::new_empty(a.x, shape);
}

inline Scales scales_of(const Tensor& scales) {
  const ScalarType dtype = scales.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "dequant_gemm: scales must be bfloat16, float16 or float32");
  return {scales.data_ptr(), scales.size(1), dtype == ScalarType::Float,
          dtype == ScalarType::BFloat16};
}

template <typename T>
Call<T> call_of(const Arguments& a, const Problem& p, const Tensor& out) {
  return {p,
          data<const T>(a.x),
          data<const uint32_t>(a.qweight),
          scales_of(a.scales),
          a.bias ? data<const T>(*a.bias) : nullptr,
          a.residual ? data<const T>(*a.residual) : nullptr,
          data<T>(out),
          a.swiglu,
          a.settled};
}

// Calls f(call) with the element type of x and f's first template argument the width of the codes:
// f.operator()<kBits>(call).
template <typename F>
Tensor run_on(const Arguments& a, F&& f) {
  const Problem p = problem_of(a);
  check_tensors(a, p);
  Tensor out = output_of(a);
  if (p.m == 0 || p.n == 0) return out;
  dispatch_floating(a.x.scalar_type(), "dequant_gemm", [&](auto element) {
    const auto call = call_of<decltype(element)>(a, p, out);
    if (a.bits == 4) {
      f.template operator()<4>(call);
    } else {
      f.template operator()<8>(call);
    }
  });
  return out;
}

}  // namespace grace::dequant_gemm
