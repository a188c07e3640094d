// Sixteen tokens of the cache in a warp's registers, and what they add to its sums.
//
// Keys are operand B of q kᵀ and values operand B of p v, straight from global memory: which
// columns of a product a lane's sixteen bytes stand for is free, as long as both operands agree.
//
//   keys    lane (gid, tig) holds token 8 h + gid, elements 32 s + 8 tig + 0 ... 7, of steps s:
//   they
//           are k = 2 tig, 2 tig + 1, 2 tig + 8, 2 tig + 9 of two products
//   values  lane (gid, tig) holds tokens 2 tig + {0, 1, 8, 9}, elements (dim / 8) gid + 0 ...: they
//           are column gid of dim / 8 products
#pragma once

#include "common/mma.h"
#include "ops/decode_attention/call.h"

namespace grace::decode_attention {

constexpr float kNone = -INFINITY;

template <int kDim, typename T>
struct Tile {
  static constexpr int kSteps = kDim / 32;       // loads of a key
  static constexpr int kValueLoads = kDim / 64;  // of a value
  uint4 keys[2][kSteps];
  uint4 values[4][kValueLoads];
  unsigned seen;  // bit 2 h + i: token 8 h + 2 tig + i

  // Tokens first ... first + 15; those behind the last are zero, and not seen.
  __device__ __forceinline__ void load(const T* k, const T* v, const bool* mask, int first,
                                       int last) {
    const int lane = threadIdx.x % kWarpSize, gid = lane / 4, tig = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = first + 8 * h + gid;
      const uint4* const from = reinterpret_cast<const uint4*>(k + int64_t{token} * kDim) + tig;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) keys[h][s] = token <= last ? from[4 * s] : uint4{0, 0, 0, 0};
    }
    seen = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + 8 * (i / 2) + 2 * tig + i % 2;
      const uint4* const from =
          reinterpret_cast<const uint4*>(v + int64_t{token} * kDim) + gid * kValueLoads;
#pragma unroll
      for (int s = 0; s < kValueLoads; ++s)
        values[i][s] = token <= last ? from[s] : uint4{0, 0, 0, 0};
      const bool shown = token == last || (token < last && mask[token]);
      seen |= unsigned{shown} << i;
    }
  }

  // Elements 2 word, 2 word + 1 of the values of a token.
  __device__ __forceinline__ uint32_t value_words(int token, int word) const {
    const uint4& four = values[token][word / 4];
    return word % 4 == 0 ? four.x : word % 4 == 1 ? four.y : word % 4 == 2 ? four.z : four.w;
  }
};

// Running softmax of a warp's tokens, for rows gid (and gid + 8 with two halves) of the group.
template <int kDim, int kHalves, typename T>
struct Sums {
  static constexpr int kSteps = kDim / 32, kProducts = kDim / 8;
  uint4 q[kHalves][kSteps];  // elements 32 s + 8 tig + 0 ... 7 of a row
  float out[kProducts][2 * kHalves] = {};
  float most[kHalves], sum[kHalves] = {};  // of scores, in units of log 2; of this lane's weights

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int r = 0; r < kHalves; ++r) most[r] = kNone;
  }

  // Queries out of shared memory: kMostHeads rows that are `pitch` elements apart.
  __device__ __forceinline__ void take_queries(const T* shared, int pitch) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int r = 0; r < kHalves; ++r)
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
        q[r][s] = *reinterpret_cast<const uint4*>(shared + (lane / 4 + 8 * r) * pitch + 32 * s +
                                                  lane % 4 * 8);
  }

  __device__ __forceinline__ void add(const Tile<kDim, T>& tile, float scale) {
    float scores[2][4] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const uint4& b = tile.keys[h][s];
        multiply(scores[h], q[0][s].x, q[kHalves - 1][s].x, q[0][s].y, q[kHalves - 1][s].y, b.x,
                 b.y);
        multiply(scores[h], q[0][s].z, q[kHalves - 1][s].z, q[0][s].w, q[kHalves - 1][s].w, b.z,
                 b.w);
      }
    }
    uint32_t weights[2][kHalves];
#pragma unroll
    for (int r = 0; r < kHalves; ++r) weigh(r, scores, tile.seen, scale, weights);
#pragma unroll
    for (int u = 0; u < kProducts; ++u) {
      uint32_t b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t first = tile.value_words(2 * half, u / 2);
        const uint32_t second = tile.value_words(2 * half + 1, u / 2);
        b[half] =
            u % 2 == 0 ? (first & 0xffffu) | second << 16 : first >> 16 | (second & 0xffff0000u);
      }
      float d[4] = {out[u][0], out[u][1], kHalves == 2 ? out[u][2 * kHalves - 2] : 0.0f,
                    kHalves == 2 ? out[u][2 * kHalves - 1] : 0.0f};
      multiply(d, weights[0][0], weights[0][kHalves - 1], weights[1][0], weights[1][kHalves - 1],
               b[0], b[1]);
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) out[u][i] = d[i];
    }
  }

 private:
  // a0, a2: of row gid; a1, a3: of row gid + 8, of which there is nothing where all rows are eight.
  __device__ __forceinline__ static void multiply(float (&d)[4], uint32_t a0, uint32_t a1,
                                                  uint32_t a2, uint32_t a3, uint32_t b0,
                                                  uint32_t b1) {
    const uint32_t a[4] = {a0, kHalves == 2 ? a1 : 0, a2, kHalves == 2 ? a3 : 0}, b[2] = {b0, b1};
    mma_m16n8k16<T>(d, a, b);
  }

  // Scores of a row become weights, relative to the largest score so far.
  __device__ __forceinline__ void weigh(int r, const float (&scores)[2][4], unsigned seen,
                                        float scale, uint32_t (&weights)[2][kHalves]) {
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
#pragma unroll
    for (int u = 0; u < kProducts; ++u)
#pragma unroll
      for (int i = 0; i < 2; ++i) out[u][2 * r + i] *= before;
    weights[0][r] = pair_from_floats<T>(in_log2[0], in_log2[1]);
    weights[1][r] = pair_from_floats<T>(in_log2[2], in_log2[3]);
  }
};

}  // namespace grace::decode_attention
