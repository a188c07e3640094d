// The gradient of images in Gram form, from W as gram.h leaves it.
#pragma once

#include "ops/cka/gram.h"

namespace grace::cka {

// G = W S and the gradient: a tile a block, through the normalization. The second range of tile
// rows is of rows that lie in no image.
template <typename T>
struct DirectionArguments {
  GramArguments gram;
  const T* student;      // [rows, width]
  const float* inverse;  // [rows]
  const float* grad;     // [images]
  T* out;                // [rows, width]
  bool wide;             // rows of student and out begin at multiples of 16 bytes
};

// Eight elements of the gradient of a row: g in centered rows, `along` = ⟨unit row, g⟩.
template <typename T>
__device__ __forceinline__ void write_eight(const DirectionArguments<T>& x, int row, int column,
                                            const float (&g)[kWide], float along) {
  const int width = x.gram.student_width;
  const int64_t at = int64_t{row} * width + column;
  const float inverse = x.inverse == nullptr ? 0.0f : x.inverse[row];
  float out[kWide];
  if (x.wide) {
    const auto v = *reinterpret_cast<const Eight<T>*>(x.student + at);
#pragma unroll
    for (int i = 0; i < kWide; ++i) out[i] = (g[i] - to_float(v.at[i]) * inverse * along) * inverse;
    store_eight(x.out + at, out);
    return;
  }
  for (int i = 0; i < kWide && column + i < width; ++i)
    x.out[at + i] = from_float<T>((g[i] - to_float(x.student[at + i]) * inverse * along) * inverse);
}

template <typename T>
__device__ __forceinline__ void clear_rows(const DirectionArguments<T>& x, int first, int count,
                                           int first_column) {
  const int left = x.gram.student_width - first_column;
  const int width = left < kTile ? left : kTile;
  for (int i = threadIdx.x; i < count * width; i += kGroup)
    x.out[int64_t{first + i / width} * x.gram.student_width + first_column + i % width] =
        from_float<T>(0.0f);
}

template <typename T>
__device__ void clear_outside(const DirectionArguments<T>& x, int tile_row, int first_column) {
  const Images& images = x.gram.images;
  const int begin = images.count > 0 ? images.bound(0) : images.rows;
  const int end = images.count > 0 ? images.bound(images.count) : images.rows;
  const int first = tile_row * kTile;
  const int last = first + kTile < images.rows ? first + kTile : images.rows;
  if (begin > first) clear_rows(x, first, (begin < last ? begin : last) - first, first_column);
  const int from = end > first ? end : first;
  if (from < last) clear_rows(x, from, last - from, first_column);
}

template <typename T>
__global__ void __launch_bounds__(kGroup, 2) direction_kernel(DirectionArguments<T> x) {
  wait_for_previous_kernel();
  GRACE_DYNAMIC_SHARED(shared);
  __shared__ float along[kTile];
  const GramArguments& gram = x.gram;
  const int tile_rows = gram.images.piece_bound<kTile>();
  const int first_column = static_cast<int>(blockIdx.y) * kTile;
  if (static_cast<int>(blockIdx.x) >= tile_rows) {
    clear_outside(x, static_cast<int>(blockIdx.x) - tile_rows, first_column);
    return;
  }
  const Piece piece = piece_of<kTile>(blockIdx.x, gram.images);
  const int tiles = piece.image < 0 ? 0 : gram.tiles(piece.image);
  if (tiles == 0) return;
  const int64_t weight = before(gram, piece.image).weights + int64_t{piece.index} * tiles;
  if (!gram.weights.has(weight)) return;
  const float* const kept = gram.saved + piece.image * kSavedColumns;
  if (kept[kCounted] == 0.0f) return clear_rows(x, piece.first, piece.count, first_column);

  float sum = 0.0f;
#pragma unroll 2
  for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
    for (int share = 0; share < kShares; ++share)
      sum += gram.weights.along(weight + tile)[share * kTile + threadIdx.x];
  along[threadIdx.x] = sum;

  const int n = gram.images.length(piece.image), pitch = kept_pitch(gram.student_width);
  Operand w = plain(gram.weights.tile(weight), kTile, piece.count, n);
  w.two_stages = kWeightBytes / 2;
  const int64_t begin = gram.images.bound(piece.image);
  const Operand s = turned(gram.student + begin * pitch + first_column, pitch,
                           pitch - first_column < kTile ? pitch - first_column : kTile, n);
  Accumulator tile = {};
  add_product<false, true>(tile, w, s, false, stages_of(w), shared);
  auto* const g = reinterpret_cast<float*>(shared);
  store_tile(g, tile);
  __syncthreads();

  const float factor =
      2.0f * x.grad[piece.image] / (sqrtf(kept[kHsicStudent]) * static_cast<float>(n));
  const float unscale = factor / row_scale(gram.student_width);
  const int column = threadIdx.x % (kTile / kWide) * kWide;
  if (first_column + column >= gram.student_width) return;
  for (int row = threadIdx.x / (kTile / kWide); row < piece.count; row += kGroup * kWide / kTile) {
    float v[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] = g[row * kSharedPitch + column + i] * unscale;
    write_eight(x, piece.first + row, first_column + column, v, along[row] * factor);
  }
}

static_assert(kTileBytes >= kSharedTile * 4 && kGroup == kTile);

}  // namespace grace::cka
