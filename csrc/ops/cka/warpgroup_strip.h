// A finished strip of a pair of tiles, of K and of L: 64 rows, 32 columns, four fragments d of
// mma.h a thread. Forward it adds to three sums. Backward it becomes W = (n / |L|) (L - ratio K),
// whose elements are near 1, at (i, j) and turned at (j, i).
#pragma once

#include "ops/cka/warpgroup_ring.h"

namespace grace::cka::warpgroup {

using Strip = float[4][4];

struct Place {
  int row_block, column_block;  // of the image
  int half;                     // of the block's columns

  __device__ __forceinline__ int row(int e) const {
    return row_block * kBlock + threadIdx.x % kGroup / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ int column(int f, int e) const {
    return column_block * kBlock + half * 32 + f * 8 + threadIdx.x % 4 * 2 + e % 2;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Divides by the rows' scales, and puts 0 where the image has no rows.
__device__ __forceinline__ void unscale(Strip& v, const Arguments& x, int model, int n,
                                        const Place& place) {
  const float scale = row_scale(x.widths[model]), factor = 1.0f / (scale * scale);
#pragma unroll
  for (int f = 0; f < 4; ++f)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool inside = place.row(e) < n && place.column(f, e) < n;
      v[f][e] = inside ? v[f][e] * factor : 0.0f;
    }
}

// A thread's part of the strip's sums; what is above the diagonal counts twice.
__device__ __forceinline__ void add_sums(float (&sums)[3], const Strip& k, const Strip& l,
                                         const Place& place) {
  float own[3] = {};
#pragma unroll
  for (int f = 0; f < 4; ++f)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      own[kHsicBoth] += k[f][e] * l[f][e];
      own[kHsicStudent] += k[f][e] * k[f][e];
      own[kHsicTeacher] += l[f][e] * l[f][e];
    }
  const float weight = place.row_block == place.column_block ? 1.0f : 2.0f;
  for (int i = 0; i < 3; ++i) sums[i] += weight * own[i];
}

__device__ __forceinline__ uint32_t pair_of_halves(float low, float high) {
  return from_float<fp16>(low).bits | uint32_t{from_float<fp16>(high).bits} << 16;
}

// Two neighbours of a panel, at row `row` of the image and `column` of its block.
__device__ __forceinline__ void store_pair(fp16* panel, int row, int column, uint32_t pair) {
  const int at = row % kTile;
  *reinterpret_cast<uint32_t*>(panel + at * kBlock + (column / 8 ^ at % 8) * 8 + column % 8) = pair;
}

// An 8 x 8 matrix of 16-bit elements, a fragment of a warp, turned round.
__device__ __forceinline__ uint32_t turned(uint32_t v) {
  uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(v));
  return to;
}

// W of the strip, from K and L.
class Weigh {
 public:
  __device__ __forceinline__ Weigh(const Arguments& x, const Tile& tile)
      : x_(x),
        tile_(tile),
        n_(x.images.length(tile.image.image)),
        begin_(x.images.bound(tile.image.image)) {
    const float* const kept = x.saved + tile.image.image * kSavedColumns;
    ratio_ = kept[kHsicBoth] / kept[kHsicStudent];
    scale_ = static_cast<float>(n_) / sqrtf(kept[kHsicTeacher]);
    here_ = x.panels.has(tile.panel(tile.i, 0));
    mirrored_ = x.panels.has(tile.panel(tile.j, 0));
  }

  __device__ __forceinline__ void write(const Strip& k, const Strip& l, const Place& place) const {
    Strip w;
#pragma unroll
    for (int f = 0; f < 4; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e) w[f][e] = (l[f][e] - ratio_ * k[f][e]) * scale_;
    if (here_) write_rows(w, k, place);
    if (mirrored_ && place.row_block != place.column_block) write_columns(w, k, place);
  }

 private:
  // ⟨mean, centered row⟩; 0 beyond the image.
  __device__ __forceinline__ float along(int row) const {
    return row < n_ ? __ldg(x_.along + begin_ + row) : 0.0f;
  }

  // At (i, j): a quad has a row.
  __device__ __forceinline__ void write_rows(const Strip& w, const Strip& k,
                                             const Place& place) const {
    const int number = tile_.panel(tile_.i, place.column_block);
    fp16* const panel = x_.panels.panel(number);
    float sums[2] = {};
#pragma unroll
    for (int f = 0; f < 4; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[e / 2] += w[f][e] * (k[f][e] + along(place.column(f, e)));
        if (e % 2 == 0)
          store_pair(panel, place.row(e), place.column(f, e) % kBlock,
                     pair_of_halves(w[f][e], w[f][e + 1]));
      }
    float* const shares = x_.panels.shares_of(number) + place.half * kTile;
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      float sum = sums[e / 2];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int at = place.row(e) % kTile;
      if (threadIdx.x % 4 == 0) shares[at] = sum, shares[2 * kTile + at] = 0.0f;
    }
  }

  // At (j, i): a warp has 16 columns of each of 32 rows.
  __device__ __forceinline__ void write_columns(const Strip& w, const Strip& k,
                                                const Place& place) const {
    const int number = tile_.panel(tile_.j, place.row_block);
    fp16* const panel = x_.panels.panel(number);
    const int warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
    float* const shares = x_.panels.shares_of(number) + warp * kTile;
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const int first = place.column(f, 0) - lane % 4 * 2;
#pragma unroll
      for (int e = 0; e < 4; e += 2)
        store_pair(panel, first + lane / 4, warp * 16 + e / 2 * 8 + lane % 4 * 2,
                   turned(pair_of_halves(w[f][e], w[f][e + 1])));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = 0.0f;
#pragma unroll
        for (int low = 0; low < 2; ++low)
          sum += w[f][e + 2 * low] * (k[f][e + 2 * low] + along(place.row(2 * low)));
        for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
        if (lane < 4) shares[place.column(f, e) % kTile] = sum;
      }
    }
  }

  const Arguments& x_;
  const Tile& tile_;
  const int n_, begin_;
  float ratio_, scale_;
  bool here_, mirrored_;
};

#endif

}  // namespace grace::cka::warpgroup
