// Sixteen tokens of the cache in a warp's registers, and what they add to its sums.
//
// Keys are operand B of q kᵀ and values operand B of p v, straight from global memory: which
// columns of a product a lane's sixteen bytes stand for is free, as long as both operands agree.
//
//   keys    lane (gid, tig) holds token 8 h + gid, elements 32 s + 8 tig + 0 ... 7, of steps s:
//   they
//           are k = 2 tig, 2 tig + 1, 2 tig + 8, 2 tig + 9 of two products
//   values  lane (gid, tig) holds tokens 2 tig + {0, 1, 8, 9}, elements 64 s + 8 gid + 0 ... 7:
//   they
//           are column gid of eight products
#pragma once

#include "common/mma.h"
#include "ops/decode_attention/call.h"

namespace grace::decode_attention {

constexpr float kNone = -INFINITY;

// The head of the cache that a block reads.
template <typename T>
struct Cache {
  T *keys, *values;  // [length][dim]
  const bool* mask;  // [length]
  int last;          // the new token
};

template <int kDim, typename T>
struct Keys {
  static constexpr int kSteps = kDim / 32;
  uint4 of[2][kSteps];
  unsigned seen;  // bit 2 h + i: token 8 h + 2 tig + i

  // Tokens first ... first + 15; those behind the last are zero, and not seen.
  __device__ __forceinline__ void load(const Cache<T>& cache, int first) {
    const int lane = threadIdx.x % kWarpSize, gid = lane / 4, tig = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = first + 8 * h + gid;
      const uint4* const from =
          reinterpret_cast<const uint4*>(cache.keys + int64_t{token} * kDim) + tig;
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
        of[h][s] = token <= cache.last ? from[4 * s] : uint4{0, 0, 0, 0};
    }
    seen = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + 8 * (i / 2) + 2 * tig + i % 2;
      const bool shown = token == cache.last || (token < cache.last && cache.mask[token]);
      seen |= unsigned{shown} << i;
    }
  }
};

template <int kDim, typename T>
struct Values {
  static constexpr int kSteps = kDim / 64;
  uint4 of[4][kSteps];

  __device__ __forceinline__ void load(const Cache<T>& cache, int first) {
    const int lane = threadIdx.x % kWarpSize, gid = lane / 4, tig = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + 8 * (i / 2) + 2 * tig + i % 2;
      const uint4* const from =
          reinterpret_cast<const uint4*>(cache.values + int64_t{token} * kDim) + gid;
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
        of[i][s] = token <= cache.last ? from[8 * s] : uint4{0, 0, 0, 0};
    }
  }

  // Elements 2 word, 2 word + 1 that this lane holds of a token.
  __device__ __forceinline__ uint32_t words(int token, int word) const {
    const uint4& four = of[token][word / 4];
    return word % 4 == 0 ? four.x : word % 4 == 1 ? four.y : word % 4 == 2 ? four.z : four.w;
  }
};

// Running softmax of a warp's tokens. Scores are of rows gid (and gid + 8 with two halves) of the
// group; sums of heads 8 r + 2 tig + i, elements 64 s + 8 gid + 2 j + e, at out[4 s + j][r][2 e +
// i].
template <int kDim, int kHalves, typename T>
struct Sums {
  static constexpr int kSteps = kDim / 32, kProducts = kDim / 16;
  float out[kProducts][kHalves][4] = {};
  float most[kHalves], sum[kHalves] = {};  // of scores, in units of log 2; of this lane's weights

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int r = 0; r < kHalves; ++r) most[r] = kNone;
  }

  // Queries lie in shared memory, kMostHeads rows that are `pitch` elements apart.
  __device__ __forceinline__ static void score(const T* queries, int pitch,
                                               const Keys<kDim, T>& keys, float (&scores)[2][4]) {
    const int lane = threadIdx.x % kWarpSize;
    const T* const row = queries + lane / 4 * pitch + lane % 4 * 8;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint4 a = *reinterpret_cast<const uint4*>(row + 32 * s);
      uint4 below = {0, 0, 0, 0};
      if constexpr (kHalves == 2) below = *reinterpret_cast<const uint4*>(row + 8 * pitch + 32 * s);
      const uint32_t first[4] = {a.x, below.x, a.y, below.y};
      const uint32_t second[4] = {a.z, below.z, a.w, below.w};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4& b = keys.of[h][s];
        mma_m16n8k16<T>(scores[h], first, {b.x, b.y});
        mma_m16n8k16<T>(scores[h], second, {b.z, b.w});
      }
    }
  }

  // Scores become weights relative to the largest so far.
  __device__ __forceinline__ void weigh(const float (&scores)[2][4], unsigned seen, float scale,
                                        uint32_t (&weights)[kHalves][2]) {
    const int tig = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < kHalves; ++r) {
      const float before = weigh_row(r, scores, seen, scale, weights[r]);
      const float of_head[2] = {__shfl_sync(kFullWarp, before, 8 * tig),
                                __shfl_sync(kFullWarp, before, 8 * tig + 4)};
#pragma unroll
      for (int u = 0; u < kProducts; ++u)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[u][r][i] *= of_head[i % 2];
    }
  }

  __device__ __forceinline__ void add(const uint32_t (&weights)[kHalves][2],
                                      const Values<kDim, T>& values) {
#pragma unroll
    for (int u = 0; u < kProducts; ++u) {
      uint32_t a[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t one = values.words(2 * half, u), other = values.words(2 * half + 1, u);
        a[2 * half] = (one & 0xffffu) | other << 16;
        a[2 * half + 1] = one >> 16 | (other & 0xffff0000u);
      }
#pragma unroll
      for (int r = 0; r < kHalves; ++r) mma_m16n8k16<T>(out[u][r], a, weights[r]);
    }
  }

 private:
  // Returns what earlier sums of the row are to be multiplied by.
  __device__ __forceinline__ float weigh_row(int r, const float (&scores)[2][4], unsigned seen,
                                             float scale, uint32_t (&weights)[2]) {
    float in_log2[4], largest = most[r];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      in_log2[i] = seen >> i & 1 ? scores[i / 2][2 * r + i % 2] * (scale * kLog2E) : kNone;
      largest = fmaxf(largest, in_log2[i]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
    const float base = largest == kNone ? 0.0f : largest;
    const float before = exp2f(most[r] - base);
    most[r] = largest;
#pragma unroll
    for (int i = 0; i < 4; ++i) in_log2[i] = exp2f(in_log2[i] - base);
    sum[r] = sum[r] * before + ((in_log2[0] + in_log2[1]) + (in_log2[2] + in_log2[3]));
    weights[0] = pair_from_floats<T>(in_log2[0], in_log2[1]);
    weights[1] = pair_from_floats<T>(in_log2[2], in_log2[3]);
    return before;
  }
};

}  // namespace grace::decode_attention
