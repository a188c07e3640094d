// G = W S by wgmma and the gradient, through the normalization: a cluster of two thread blocks goes
// from two tiles to the next two, 192 rows of an image and 192 columns each; they share W. Of the
// rows of S the tile's own come last, and stay in shared memory until the gradient is made of them.
#pragma once

#include "ops/cka/direction.h"
#include "ops/cka/warpgroup_gram.h"

namespace grace::cka::warpgroup {

template <typename T>
struct DirectionArguments {
  Arguments gram;
  const float* means;    // [images, pitch] of unit rows
  const float* inverse;  // [rows]
  const float* grad;     // [images]
  T* out;                // [rows, width]
  bool fours;            // four neighbours of out can be written together
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct OutputTile {
  Found image;
  int row;     // of tiles, in the image
  int column;  // of tiles

  __device__ __forceinline__ int blocks() const { return min(kSide, image.blocks - row * kSide); }
  __device__ __forceinline__ int panel(int block) const {
    return image.before.panels + row * image.blocks + block;
  }
  // The block of rows of S of a stage.
  __device__ __forceinline__ int block_of(int stage) const {
    const int own = row * kSide, others = image.blocks - blocks();
    if (stage >= others) return own + stage - others;
    return stage < own ? stage : stage + blocks();
  }
};

// Calls f(tile) for this thread block's tiles of rows whose W is in memory; a tile may lie behind
// the last column. By whole warps.
template <typename F>
__device__ __forceinline__ void walk_outputs(const Arguments& x, const F& f) {
  const int columns = (x.widths[0] + kTile - 1) / kTile;
  const int couples = (columns + 1) / 2, all = all_of(x).rows * couples;
  const int rank = static_cast<int>(cluster_rank());
  for (int i = static_cast<int>(blockIdx.x) / kCluster; i < all; i += x.clusters) {
    const Found image = find<&Counts::rows>(x, i / couples);
    const OutputTile tile = {image, i / couples - image.before.rows, i % couples * 2 + rank};
    if (x.panels.has(tile.panel(0))) f(tile);
  }
}

__device__ __forceinline__ bool counted(const Arguments& x, int image) {
  return x.saved[image * kSavedColumns + kCounted] != 0.0f;
}

// By the warp that copies: a panel of W, and 64 rows of S.
__device__ __forceinline__ void copy_operands(const Maps& maps, const Arguments& x, Ring& ring,
                                              const OutputTile& tile) {
  const int bytes = tile.blocks() * kBlockBytes, begin = x.images.bound(tile.image.image);
  const int rank = static_cast<int>(cluster_rank());
  for (int stage = 0; stage < tile.image.blocks; ++stage, ring.next()) {
    const int block = tile.block_of(stage);
    wait_for(ring.empty(), ring.parity() ^ 1);
    warp_expect_bytes(ring.full(), bytes + kOperandBytes);
    if (ring.turn() == rank)
      warp_copy_bytes_to(3, ring.stage(), x.panels.panel(tile.panel(block)), bytes, ring.full());
#pragma unroll
    for (int i = 0; i < kSide; ++i)
      warp_copy_box(ring.stage() + kOperandBytes + i * kBlockBytes, maps.rows[0],
                    tile.column * kTile + i * kBlock, begin + block * kBlock, ring.full());
  }
}

// Rows of S behind the image's end are another's, or nobody's: W is 0 there, but they may be NaN.
__device__ __forceinline__ void clear_behind(uint32_t stage, int rows) {
  const uint32_t zeros[4] = {};
  for (int i = threadIdx.x; i < kSide * (kBlock - rows) * 8; i += kMultipliers) {
    const int row = rows + i / 8 % (kBlock - rows), block = i / 8 / (kBlock - rows);
    write_shared(stage + kOperandBytes + block * kBlockBytes + row * 128 + i % 8 * 16, zeros);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  multipliers_barrier();
}

// ⟨unit row, W S⟩ of two rows of a tile, 8 apart: a lane of a quad has a share of each.
__device__ __forceinline__ void sum_shares(float (&along)[2], const Arguments& x,
                                           const OutputTile& tile, int row) {
  const float* from = x.panels.shares_of(tile.panel(0)) + threadIdx.x % 4 * kTile + row;
  float sums[2] = {};
#pragma unroll 4
  for (int block = 0; block < tile.image.blocks; ++block, from += kShares * kTile)
    sums[0] += from[0], sums[1] += from[8];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums[i] += __shfl_xor_sync(kFullWarp, sums[i], 1);
    along[i] = sums[i] + __shfl_xor_sync(kFullWarp, sums[i], 2);
  }
}

template <typename T>
struct alignas(8) Four {
  T at[4];
};

// Four neighbours of two fragments of a row: of the first in even lanes, of the second in odd ones.
__device__ __forceinline__ void four_of(float (&v)[4], const float* first, const float* second) {
  const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float other = __shfl_xor_sync(kFullWarp, odd ? first[i] : second[i], 1);
    v[i] = odd ? other : first[i];
    v[i + 2] = odd ? second[i] : other;
  }
}

// A row of the tile. `own`: where the row of S lies in shared memory, `swizzle` what its chunks of
// 16 bytes are numbered by.
template <typename T>
__device__ __forceinline__ void write_row(const DirectionArguments<T>& x, T* to, const float* mean,
                                          uint32_t own, int swizzle, int columns, const float* d,
                                          float unscale, float inverse, float along) {
  const float unscale_row = 1.0f / row_scale(x.gram.widths[0]);
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kTile / 16; ++i) {
    float g[4];
    four_of(g, d + i * 8, d + i * 8 + 4);
    const int column = i * 16 + lane % 2 * 8 + lane / 2 * 4;
    if (column >= columns) continue;
    const uint32_t at =
        own + i / 4 * kBlockBytes + ((column / 8 % 8) ^ swizzle) * 16 + lane / 2 * 8;
    uint32_t pairs[2];
    read_shared_pairs(at, pairs);
    const float4 m = __ldg(reinterpret_cast<const float4*>(mean + column));
    const float means[4] = {m.x, m.y, m.z, m.w};
    Four<T> v;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const fp16 s = {static_cast<uint16_t>(pairs[e / 2] >> (e % 2 * 16))};
      const float unit = to_float(s) * unscale_row + means[e];
      v.at[e] = from_float<T>((g[e] * unscale - unit * along) * inverse);
    }
    if (x.fours) {
      *reinterpret_cast<Four<T>*>(to + column) = v;
    } else {
      for (int e = 0; e < 4 && column + e < columns; ++e) to[column + e] = v.at[e];
    }
  }
}

// `own`: the 64 rows of S of this warpgroup's rows, in shared memory.
template <typename T>
__device__ __forceinline__ void write_rows(const DirectionArguments<T>& x, const OutputTile& tile,
                                           const float (&d)[kSide * 32], const float (&along)[2],
                                           int first_row, uint32_t own) {
  const Arguments& gram = x.gram;
  const int image = tile.image.image, n = gram.images.length(image), width = gram.widths[0];
  const float factor =
      2.0f * x.grad[image] /
      (sqrtf(gram.saved[image * kSavedColumns + kHsicStudent]) * static_cast<float>(n));
  const float unscale = factor / row_scale(width);
  const int first = tile.column * kTile;
  const float* const mean = x.means + int64_t{image} * kept_pitch(width) + first;
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    const int row = tile.row * kTile + first_row + low * 8;
    const int64_t at = gram.images.bound(image) + row;
    const bool inside = row < n;
    write_row(x, x.out + at * width + first, mean, own + first_row % kBlock * 128 + low * 1024,
              first_row % 8, inside ? width - first : 0, d + low * 2, unscale,
              inside ? x.inverse[at] : 0.0f, along[low] * factor);
  }
}

// By the warps that multiply.
template <typename T>
__device__ __forceinline__ void clear_rows(const DirectionArguments<T>& x, int first, int count,
                                           int first_column) {
  const int width = x.gram.widths[0];
  const int columns = max(0, min(kTile, width - first_column));
  for (int i = threadIdx.x; i < count * columns; i += kMultipliers)
    x.out[int64_t{first + i / columns} * width + first_column + i % columns] = from_float<T>(0.0f);
}

template <typename T>
__device__ __forceinline__ void make_output(const DirectionArguments<T>& x, const OutputTile& tile,
                                            Ring& ring) {
  const Arguments& gram = x.gram;
  const int image = tile.image.image, n = gram.images.length(image);
  if (!counted(gram, image)) {
    const int first = tile.row * kTile;
    return clear_rows(x, gram.images.bound(image) + first, min(kTile, n - first),
                      tile.column * kTile);
  }
  const int group = uniform_warp() / 4, last = n % kBlock, blocks = tile.image.blocks;
  const int row = group * kBlock + threadIdx.x % kGroup / 32 * 16 + threadIdx.x % 32 / 4;
  const auto clear_last = [&](int stage, uint32_t at) {
    if (last != 0 && tile.block_of(stage) == blocks - 1) clear_behind(at, last);
  };
  if (group >= tile.blocks()) {
    for (int stage = 0; stage < blocks; ++stage, ring.next()) {
      wait_for(ring.full(), ring.parity());
      clear_last(stage, ring.stage());
      release(ring.empty());
    }
    return;
  }
  float along[2];
  sum_shares(along, gram, tile, row);
  float d[kSide * 32];
#pragma unroll
  for (int i = 0; i < kSide * 32; ++i) d[i] = 0.0f;
  uint32_t own = 0;
  multiply_stages<kTile, true>(d, ring, blocks, tile.blocks(), group * kBlockBytes, kOperandBytes,
                               [&](int stage, uint32_t at) {
                                 clear_last(stage, at);
                                 if (stage == blocks - tile.blocks() + group)
                                   own = at + kOperandBytes;
                               });
  write_rows(x, tile, d, along, row, own);
  for (int i = tile.blocks(); i > 0; --i) release(ring.empty_before(i));
}

// Of rows that lie in no image, by all thread blocks together.
template <typename T>
__device__ __forceinline__ void clear_outside(const DirectionArguments<T>& x) {
  const Images& images = x.gram.images;
  const int begin = images.count > 0 ? images.bound(0) : images.rows;
  const int end = images.count > 0 ? images.bound(images.count) : images.rows;
  const int64_t width = x.gram.widths[0], step = int64_t{gridDim.x} * blockDim.x;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < begin * width; i += step) x.out[i] = from_float<T>(0.0f);
  for (int64_t i = end * width + thread; i < images.rows * width; i += step)
    x.out[i] = from_float<T>(0.0f);
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    direction_kernel(const __grid_constant__ Maps maps,
                     const __grid_constant__ DirectionArguments<T> x) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  GRACE_DYNAMIC_SHARED(shared);
  Ring ring = make_ring(shared);
  wait_for_previous_kernel();
  if (x.gram.panels.window == 0) clear_outside(x);
  const int warp = uniform_warp();
  if (warp >= kMultiplierWarps) {
    give_registers();
    if (warp == kMultiplierWarps)
      walk_outputs(x.gram, [&](const OutputTile& tile) {
        if (counted(x.gram, tile.image.image)) copy_operands(maps, x.gram, ring, tile);
      });
  } else {
    take_registers();
    walk_outputs(x.gram, [&](const OutputTile& tile) { make_output(x, tile, ring); });
  }
  cluster_barrier(kCluster);
#endif
}

}  // namespace grace::cka::warpgroup
