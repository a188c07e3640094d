// cka of float32 inputs: everything in float32 on CUDA cores, Grams only. Forward, one pass over
// the tiles of all images' Grams, of which three sums a block leave the chip. Backward, the Grams'
// difference is made kStrip columns at a time and multiplied into rows that one block owns.
#pragma once

#include "ops/cka/rows.h"

namespace grace::cka::float32 {

constexpr int kTile = 64;
constexpr int kSide = 16;             // threads along each side of a tile
constexpr int kEach = kTile / kSide;  // values along each side that a thread keeps
constexpr int kDepth = 32;            // of a product, in shared memory at a time
constexpr int kTileColumns = 32;      // blocks that share one row of tiles
constexpr int kStrip = 512;           // columns of the Grams' difference in memory at a time
constexpr int kStripTiles = kStrip / kTile;

static_assert(kSide * kSide == kThreads);

// Centered unit rows, as center_kernel leaves them.
struct Centered {
  const float* rows;  // [rows, pitch]
  int width;
  int pitch;
  float unscale;

  // 0 at and beyond the image's end and the row's.
  __device__ __forceinline__ float at(int row, int end, int column) const {
    if (row >= end || column >= width) return 0.0f;
    return rows[int64_t{row} * pitch + column] * unscale;
  }
};

// A tile's values in registers: thread (x, y) has rows y + kSide i and columns x + kSide j.
using Tile = float[kEach][kEach];

__device__ __forceinline__ int tile_x() { return threadIdx.x % kSide; }
__device__ __forceinline__ int tile_y() { return threadIdx.x / kSide; }

// Two operands of a product in shared memory, one column more than used against bank conflicts.
struct Operands {
  float a[kTile][kDepth + 1];
  float b[kTile][kDepth + 1];

  // tile += a bᵀ
  __device__ __forceinline__ void multiply_into(Tile& tile) const {
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      float left[kEach], right[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        left[i] = a[tile_y() + kSide * i][k];
        right[i] = b[tile_x() + kSide * i][k];
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) tile[i][j] += left[i] * right[j];
    }
  }
};

// tile = the Gram of rows from `first` and rows from `second`, both of one image that ends at
// `end`.
__device__ inline void gram_tile(const Centered& x, int first, int second, int end,
                                 Operands& shared, Tile& tile) {
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) tile[i][j] = 0.0f;
  const int lane = threadIdx.x % kDepth;
  for (int depth = 0; depth < x.width; depth += kDepth) {
    for (int row = threadIdx.x / kDepth; row < kTile; row += kThreads / kDepth) {
      shared.a[row][lane] = x.at(first + row, end, depth + lane);
      shared.b[row][lane] = x.at(second + row, end, depth + lane);
    }
    __syncthreads();
    shared.multiply_into(tile);
    __syncthreads();
  }
}

// 1. Products of Grams: a block has one row of tiles and every kTileColumns-th tile of it, on and
// above the diagonal; what is above counts twice.
__global__ void __launch_bounds__(kThreads)
    hsic_kernel(Centered student, Centered teacher,
                float* sums,  // [tile rows, kTileColumns, 3]
                Images images) {
  __shared__ Operands shared;
  __shared__ float scratch[kWarps];
  float* const out = sums + (int64_t{blockIdx.x} * kTileColumns + blockIdx.y) * 3;
  const Piece row = piece_of<kTile>(blockIdx.x, images);
  const int tiles = row.image < 0 ? 0 : images.pieces<kTile>(row.image);
  int column = row.index + static_cast<int>(blockIdx.y);
  if (column >= tiles) {
    if (threadIdx.x < 3) out[threadIdx.x] = 0.0f;
    return;
  }

  const int begin = images.bound(row.image), end = begin + images.length(row.image);
  const int first = begin + row.index * kTile;
  float both = 0.0f, own = 0.0f, other = 0.0f;
  for (; column < tiles; column += kTileColumns) {
    const float weight = column == row.index ? 1.0f : 2.0f;
    const int second = begin + column * kTile;
    Tile k, l;
    gram_tile(student, first, second, end, shared, k);
    gram_tile(teacher, first, second, end, shared, l);
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        both += weight * k[i][j] * l[i][j];
        own += weight * k[i][j] * k[i][j];
        other += weight * l[i][j] * l[i][j];
      }
  }
  const float totals[] = {block_sum<kThreads>(both, scratch), block_sum<kThreads>(own, scratch),
                          block_sum<kThreads>(other, scratch)};
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) out[i] = totals[i];
}

// 2. A block an image: its blocks' sums, in a fixed order, and CKA.
__global__ void __launch_bounds__(kThreads) value_kernel(const float* sums, Values values) {
  __shared__ float scratch[kWarps];
  const Images& images = values.images;
  const int64_t first = int64_t{images.first_piece<kTile>(blockIdx.x)} * kTileColumns;
  const int count = images.pieces<kTile>(blockIdx.x) * kTileColumns;
  float hsic[3];
  for (int which = 0; which < 3; ++which) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += kThreads) sum += sums[(first + i) * 3 + which];
    hsic[which] = block_sum<kThreads>(sum, scratch);
  }
  if (threadIdx.x == 0) values.write(blockIdx.x, hsic);
}

// 3. One strip of the Grams' weighted difference: a block a tile. Row r of `difference` belongs to
// row r of the student, its columns to the strip's rows of the same image; 0 beyond the image.
__global__ void __launch_bounds__(kThreads)
    difference_kernel(Centered student, Centered teacher,
                      const float* grad,   // [images]
                      const float* saved,  // [images, kSavedColumns]
                      float* difference,   // [rows, kStrip]
                      int strip, Images images) {
  __shared__ Operands shared;
  const Piece row = piece_of<kTile>(blockIdx.x, images);
  if (row.image < 0) return;
  const float* kept = saved + row.image * kSavedColumns;
  const int begin = images.bound(row.image), end = begin + images.length(row.image);
  const int first = begin + row.index * kTile;
  const int second = begin + strip * kStrip + static_cast<int>(blockIdx.y) * kTile;
  if (kept[kCounted] == 0.0f || second >= end) return;
  const Factors factors = gradient_factors(kept, grad[row.image]);
  Tile k, l;
  gram_tile(student, first, second, end, shared, k);
  gram_tile(teacher, first, second, end, shared, l);
  for (int i = 0; i < kEach; ++i) {
    const int at = first + tile_y() + kSide * i;
    if (at >= end) return;
    for (int j = 0; j < kEach; ++j)
      difference[int64_t{at} * kStrip + blockIdx.y * kTile + tile_x() + kSide * j] =
          factors.factor * (l[i][j] - factors.ratio * k[i][j]);
  }
}

// 4. direction (+)= strip of the difference · the strip's centered rows: a block owns a tile of it.
__global__ void __launch_bounds__(kThreads)
    direction_kernel(Centered student,
                     const float* saved,       // [images, kSavedColumns]
                     const float* difference,  // [rows, kStrip]
                     float* direction,         // [rows, width]
                     int strip, Images images) {
  __shared__ Operands shared;
  const Piece row = piece_of<kTile>(blockIdx.x, images);
  if (row.image < 0 || saved[row.image * kSavedColumns + kCounted] == 0.0f) return;
  const int begin = images.bound(row.image), end = begin + images.length(row.image);
  const int first = begin + row.index * kTile;
  const int second = begin + strip * kStrip;
  if (second >= end) return;
  const int first_column = static_cast<int>(blockIdx.y) * kTile;
  const int depths = end - second < kStrip ? end - second : kStrip;

  Tile tile = {};
  for (int depth = 0; depth < depths; depth += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
      const int at = i / kDepth, k = i % kDepth;
      const bool inside = first + at < end && depth + k < depths;
      shared.a[at][k] = inside ? difference[int64_t{first + at} * kStrip + depth + k] : 0.0f;
    }
    for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
      const int at = i % kTile, k = i / kTile;
      shared.b[at][k] = student.at(second + depth + k, end, first_column + at);
    }
    __syncthreads();
    shared.multiply_into(tile);
    __syncthreads();
  }
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int at = first + tile_y() + kSide * i, column = first_column + tile_x() + kSide * j;
      if (at >= end || column >= student.width) continue;
      float* const to = direction + int64_t{at} * student.width + column;
      *to = strip == 0 ? tile[i][j] : *to + tile[i][j];
    }
}

// 5. Through the normalization: a warp a row. Rows in no image that counts get 0.
__global__ void __launch_bounds__(kThreads)
    normalization_backward_kernel(const float* student,    // [rows, width]
                                  const float* inverse,    // [rows]
                                  const float* saved,      // [images, kSavedColumns]
                                  const float* direction,  // [rows, width]
                                  float* grad_student,     // [rows, width]
                                  int width, Images images) {
  const int row = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= images.rows) return;
  const int lane = threadIdx.x % kWarpSize;
  const int image = images.image_of_row(row);
  const bool counted = image >= 0 && saved[image * kSavedColumns + kCounted] != 0.0f;
  const float* g = direction + int64_t{row} * width;
  const float* x = student + int64_t{row} * width;
  float* out = grad_student + int64_t{row} * width;
  float along = 0.0f;
  if (counted)
    for (int i = lane; i < width; i += kWarpSize) along += g[i] * (x[i] * inverse[row]);
  along = warp_sum(along);
  for (int i = lane; i < width; i += kWarpSize)
    out[i] = counted ? (g[i] - x[i] * inverse[row] * along) * inverse[row] : 0.0f;
}

}  // namespace grace::cka::float32
