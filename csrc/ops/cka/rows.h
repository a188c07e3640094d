// The first kernels of cka: both models' rows of length 1, centered by column, are written down once,
// for the products of forward and backward. fp16 for 16-bit inputs: the rounding comes after the
// centering, so it is relative to what is left of a row, however large the images' common mean.
#pragma once

#include "common/launch.h"
#include "common/warp.h"
#include "ops/cka/cka.h"

namespace grace::cka {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPiece = 16;  // rows of one image that a block of these kernels has
constexpr int kWide = 8;    // elements that are loaded and stored together

template <typename T>
struct alignas(sizeof(T) * kWide <= 16 ? sizeof(T) * kWide : 16) Eight {
  T at[kWide];
};

// Rows of one model. `Kept` is the type of the centered rows.
template <typename T, typename Kept>
struct Rows {
  const T* raw;    // [rows, width]
  Kept* kept;      // [rows, pitch], times row_scale(width)
  float* inverse;  // [rows], 1 / norm
  float* along;    // [rows], of the mean and the centered row; or null
  float* sums;     // [pieces, pitch], of a piece's unit rows
  float* means;    // [images, pitch]
  int width;
  int pitch;
  bool wide;  // raw's rows begin at multiples of 16 bytes

  // Eight elements of a row; zeros behind it.
  __device__ __forceinline__ void load(int row, int column, float (&to)[kWide]) const {
    const T* from = raw + int64_t{row} * width + column;
    if (wide) {
      const auto loaded = *reinterpret_cast<const Eight<T>*>(from);
#pragma unroll
      for (int i = 0; i < kWide; ++i) to[i] = to_float(loaded.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWide; ++i) to[i] = column + i < width ? to_float(from[i]) : 0.0f;
    }
  }
};

template <typename T>
__device__ __forceinline__ void store_eight(T* to, const float (&from)[kWide]) {
  Eight<T> rounded;
#pragma unroll
  for (int i = 0; i < kWide; ++i) rounded.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Eight<T>*>(to) = rounded;
}

template <typename T, typename Kept>
struct BothRows {
  Rows<T, Kept> student;
  Rows<T, Kept> teacher;

  GRACE_HOST_DEVICE Rows<T, Kept> of(int model) const { return model == 0 ? student : teacher; }
};

// 1. Norms, a warp a row, then the piece's sums of unit rows: the second read comes from the cache.
template <typename T, typename Kept>
__global__ void __launch_bounds__(kThreads) norm_kernel(BothRows<T, Kept> both, Images images) {
  wait_for_previous_kernel();
  __shared__ float inverse[kPiece];
  const Rows<T, Kept> x = both.of(blockIdx.y);
  const Piece piece = piece_of<kPiece>(blockIdx.x, images);
  if (piece.image < 0) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int row = warp; row < piece.count; row += kWarps) {
    float sum = 0.0f;
#pragma unroll 4
    for (int column = lane * kWide; column < x.width; column += kWarpSize * kWide) {
      float v[kWide];
      x.load(piece.first + row, column, v);
#pragma unroll
      for (int i = 0; i < kWide; ++i) sum += v[i] * v[i];
    }
    sum = warp_sum(sum);
    if (lane == 0) x.inverse[piece.first + row] = inverse[row] = inverse_norm(sum);
  }
  __syncthreads();
  for (int column = threadIdx.x * kWide; column < x.pitch; column += kThreads * kWide) {
    float total[kWide] = {};
#pragma unroll 8
    for (int row = 0; row < piece.count; ++row) {
      float v[kWide];
      x.load(piece.first + row, column, v);
#pragma unroll
      for (int i = 0; i < kWide; ++i) total[i] += v[i] * inverse[row];
    }
    store_eight(x.sums + int64_t{blockIdx.x} * x.pitch + column, total);
  }
}

constexpr int kMeanColumns = kWarpSize * 4;

// 2. Means: a block an image and kMeanColumns columns; its warps share the pieces.
template <typename T, typename Kept>
__global__ void __launch_bounds__(kThreads) mean_kernel(BothRows<T, Kept> both, Images images) {
  wait_for_previous_kernel();
  __shared__ float sums[kWarps][kMeanColumns];
  const Rows<T, Kept> x = both.of(blockIdx.z);
  const int image = blockIdx.x, first_column = static_cast<int>(blockIdx.y) * kMeanColumns;
  if (first_column >= x.pitch) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first = images.first_piece<kPiece>(image), pieces = images.pieces<kPiece>(image);
  float total[4] = {};
  if (first_column + lane * 4 < x.pitch) {
    const float* from = x.sums + int64_t{first} * x.pitch + first_column + lane * 4;
#pragma unroll 4
    for (int piece = warp; piece < pieces; piece += kWarps) {
      const auto v = *reinterpret_cast<const float4*>(from + int64_t{piece} * x.pitch);
      total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
    }
  }
  for (int i = 0; i < 4; ++i) sums[warp][lane * 4 + i] = total[i];
  __syncthreads();
  const int column = first_column + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kMeanColumns || column >= x.pitch) return;
  float sum = 0.0f;
  for (int i = 0; i < kWarps; ++i) sum += sums[i][threadIdx.x];
  const int n = images.length(image);
  x.means[int64_t{image} * x.pitch + column] = n > 0 ? sum / static_cast<float>(n) : 0.0f;
}

// 3. The centered rows, and each one's product with the mean: a thread keeps its columns' means.
template <typename T, typename Kept>
__global__ void __launch_bounds__(kThreads) center_kernel(BothRows<T, Kept> both, Images images) {
  wait_for_previous_kernel();
  __shared__ float inverse[kPiece];
  __shared__ float sums[kWarps][kPiece];
  const Rows<T, Kept> x = both.of(blockIdx.y);
  const Piece piece = piece_of<kPiece>(blockIdx.x, images);
  if (piece.image < 0) return;
  if (threadIdx.x < kPiece)
    inverse[threadIdx.x] = static_cast<int>(threadIdx.x) < piece.count
                               ? x.inverse[piece.first + static_cast<int>(threadIdx.x)]
                               : 0.0f;
  __syncthreads();
  const float scale = row_scale(x.width);
  float along[kPiece] = {};
  for (int column = threadIdx.x * kWide; column < x.pitch; column += kThreads * kWide) {
    float mean[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      mean[i] = x.means[int64_t{piece.image} * x.pitch + column + i];
#pragma unroll
    for (int row = 0; row < kPiece; ++row) {
      if (row >= piece.count) continue;
      float v[kWide];
      x.load(piece.first + row, column, v);
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        v[i] = v[i] * inverse[row] - mean[i];
        along[row] += v[i] * mean[i];
        v[i] *= scale;
      }
      store_eight(x.kept + int64_t{piece.first + row} * x.pitch + column, v);
    }
  }
  if (x.along == nullptr) return;
#pragma unroll
  for (int row = 0; row < kPiece; ++row) {
    const float sum = warp_sum(along[row]);
    if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize][row] = sum;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= piece.count) return;
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += sums[i][threadIdx.x];
  x.along[piece.first + static_cast<int>(threadIdx.x)] = total;
}

template <typename T, typename Kept>
void launch_rows(const BothRows<T, Kept>& both, const Images& images, int device) {
  const int pieces = images.piece_bound<kPiece>();
  const int pitch =
      both.student.pitch > both.teacher.pitch ? both.student.pitch : both.teacher.pitch;
  const auto columns = static_cast<unsigned>(ceil_div(pitch, kMeanColumns));
  const auto shape = [](dim3 grid) { return LaunchShape{grid, kThreads, 0, true}; };
  launch(norm_kernel<T, Kept>, shape(dim3(pieces, 2)), device, both, images);
  launch(mean_kernel<T, Kept>, shape(dim3(images.count, columns, 2)), device, both, images);
  launch(center_kernel<T, Kept>, shape(dim3(pieces, 2)), device, both, images);
}

}  // namespace grace::cka
