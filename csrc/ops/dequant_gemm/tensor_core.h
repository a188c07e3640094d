// What the families of kernels that keep to the packed fragments share: which calls they can read,
// and how a fragment of sums becomes output.
#pragma once

#include "common/launch.h"
#include "ops/dequant_gemm/plans.h"

namespace grace::dequant_gemm {
namespace {

// Epilogue of an m16n8 fragment of sums (mma.h), the first of its rows and its first row of x:
// bias, SwiGLU, residual, the one rounding.
template <typename T>
__device__ __forceinline__ void write_fragment(const Call<T>& call, int64_t first_row,
                                               int64_t first_m, const float (&sum)[4]) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = first_row + lane / 4;
  const int64_t columns = call.columns();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t m = first_m + lane % 4 * 2 + i;
    if (m >= call.problem.m) break;
    T* const out = call.out + m * columns;
    const float low = call.biased(sum[i], row), high = call.biased(sum[i + 2], row + 8);
    if (call.swiglu) {
      const int64_t column = swiglu_column(row);
      if (column < columns) out[column] = call.finished(swiglu(low, high), m, column);
    } else {
      if (row < columns) out[row] = call.finished(low, m, row);
      if (row + 8 < columns) out[row + 8] = call.finished(high, m, row + 8);
    }
  }
}

// --- the host's side -----------------------------------------------------------------------------

// Whether the codes, scales and x of a call are laid out as these kernels read them.
template <typename T>
bool readable(const Call<T>& call) {
  const Problem& p = call.problem;
  const bool groups = p.group_size % kTile == 0 || (p.group_size == kTile / 2 && p.k % kTile == 0);
  const auto aligned16 = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  const bool aligned =
      p.k % 8 == 0 && aligned16(call.x) && aligned16(call.qweight) && aligned16(call.scales.data);
  const bool scales = !call.scales.is_float && (call.scales.is_bf16 || std::is_same_v<T, fp16>);
  return groups && aligned && scales && p.k_tiles < 1 << 16 && p.n_tiles < 1 << 24;
}

}  // namespace
}  // namespace grace::dequant_gemm
