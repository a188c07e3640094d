// Reductions over a warp and over a block; every thread gets the result. The order of the additions
// is fixed, so results are bitwise repeatable.
#pragma once

#include "common/launch.h"

namespace grace {

constexpr unsigned kFullWarp = 0xffffffffu;

// Over each kLanes neighbours, a power of two; all lanes of the warp must call.
template <int kLanes = kWarpSize>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// `scratch` holds one float a warp; all kThreads threads of the block must call.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  const int warp = threadIdx.x / kWarpSize;
  x = warp_sum(x);
  __syncthreads();  // the scratch may still be read from an earlier call
  if (threadIdx.x % kWarpSize == 0) scratch[warp] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / kWarpSize; ++i) total += scratch[i];
  return total;
}

}  // namespace grace
