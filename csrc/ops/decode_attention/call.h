// A call of decode_attention, and the new token's queries and key.
#pragma once

#include <type_traits>

#include "common/warp.h"

namespace grace::decode_attention {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kTileKeys = 16;    // tokens of the cache that a warp takes at a time
constexpr int kMostHeads = 16;   // query heads of one head of the cache
constexpr int kMostCluster = 8;  // blocks that share a head of the cache
constexpr float kLog2E = 1.4426950408889634f;

template <typename T>
struct Call {
  const T *q, *k, *v;  // [rows][heads][dim], rows apart by strides
  int64_t q_stride, k_stride, v_stride;
  const T *cos, *sin;  // [dim], rows apart by a stride, which may be 0
  int64_t cos_stride;
  T *keys, *values;  // [rows][kv_heads][length][dim]
  const int64_t* position;
  const bool* mask;              // [rows][length]
  const T *q_weight, *k_weight;  // [dim] or null
  T* out;                        // [rows][heads][dim]
  int kv_heads, group, length, mask_stride;
  float eps, scale;
  bool settled;  // what was cached may be read while the kernel ahead still runs
};

// RMS norm where there is a weight, rotary embedding, one rounding: a warp a head. A lane holds
// elements lane, lane + 32, …, of which those that are turned together are its own.
template <int kDim, typename T>
__device__ __forceinline__ void embed(const T* from, const T* weight, const T* cos, const T* sin,
                                      float eps, T* to) {
  constexpr int kEach = kDim / kWarpSize, kHalf = kEach / 2;
  const int lane = threadIdx.x % kWarpSize;
  float x[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) x[i] = to_float(from[lane + i * kWarpSize]);
  if (weight != nullptr) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) squares += x[i] * x[i];
    const float scale = 1.0f / sqrtf(warp_sum(squares) / kDim + eps);
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] *= scale * to_float(weight[lane + i * kWarpSize]);
  }
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const int low = lane + i * kWarpSize, high = low + kDim / 2;
    const float a = x[i], b = x[i + kHalf];
    to[low] = from_float<T>(a * to_float(cos[low]) - b * to_float(sin[low]));
    to[high] = from_float<T>(b * to_float(cos[high]) + a * to_float(sin[high]));
  }
}

}  // namespace grace::decode_attention
