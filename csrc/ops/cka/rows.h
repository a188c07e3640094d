// The first kernels of cka: both models' rows of length 1, centered by column, are written down
// once, for the products of forward and backward. fp16 for 16-bit inputs: the rounding comes after
// the centering, so it is relative to what is left of a row, however large the images' common mean.
#pragma once

#include "common/async_copy.h"
#include "common/launch.h"
#include "common/warp.h"
#include "ops/cka/cka.h"

namespace grace::cka {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPiece = 16;  // rows of one image that a block of these kernels has
constexpr int kBatch = 8;   // of them that are read at a time
constexpr int kWide = 8;    // elements that are loaded and stored together

template <typename T>
struct alignas(sizeof(T) * kWide <= 16 ? sizeof(T) * kWide : 16) Eight {
  T at[kWide];
};

template <typename T>
__device__ __forceinline__ void store_eight(T* to, const float (&from)[kWide]) {
  Eight<T> rounded;
#pragma unroll
  for (int i = 0; i < kWide; ++i) rounded.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Eight<T>*>(to) = rounded;
}

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

  // Eight elements of a row, zeros behind it. kAligned: rows begin at multiples of 16 bytes, and
  // their width is one of eight elements.
  template <bool kAligned>
  __device__ __forceinline__ Eight<T> load(int row, int column) const {
    const T* from = raw + int64_t{row} * width + column;
    if constexpr (kAligned) return *reinterpret_cast<const Eight<T>*>(from);
    Eight<T> v;
#pragma unroll
    for (int i = 0; i < kWide; ++i) v.at[i] = column + i < width ? from[i] : from_float<T>(0.0f);
    return v;
  }
};

template <typename T, typename Kept>
struct BothRows {
  Rows<T, Kept> student;
  Rows<T, Kept> teacher;

  GRACE_HOST_DEVICE Rows<T, Kept> of(int model) const { return model == 0 ? student : teacher; }
};

// How norm_kernel comes by its rows, which it needs twice.
enum class Source {
  kElements,  // from memory, element by element
  kAligned,   // from memory
  kStaged,    // through shared memory, kBatch rows at a time; 16-bit rows only
};

// Of shared memory, for kStaged: a batch of rows, and the sums of the columns.
template <typename T>
int64_t staged_bytes(int pitch) {
  return int64_t{pitch} * (kBatch * static_cast<int>(sizeof(T)) + 4);
}

// Rows of a piece as norm_kernel reads them.
template <typename T, typename Kept, Source kSource>
struct PieceRows {
  const Rows<T, Kept>& x;
  int first;  // of the piece
  T* staged;  // [kBatch, width]

  __device__ __forceinline__ Eight<T> load(int row, int column) const {
    if constexpr (kSource == Source::kStaged)
      return *reinterpret_cast<const Eight<T>*>(staged + row % kBatch * x.width + column);
    return x.template load<kSource != Source::kElements>(first + row, column);
  }

  __device__ __forceinline__ void stage(int begin, int end) const {
    if constexpr (kSource != Source::kStaged) return;
    const T* from = x.raw + int64_t{first + begin} * x.width;
    for (int i = threadIdx.x * kWide; i < (end - begin) * x.width; i += kThreads * kWide)
      copy_async(staged + i, from + i, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
  }

  // By a warp.
  __device__ __forceinline__ float inverse_norm_of(int row) const {
    float sum = 0.0f;
#pragma unroll 4
    for (int column = threadIdx.x % kWarpSize * kWide; column < x.width;
         column += kWarpSize * kWide) {
      const Eight<T> v = load(row, column);
#pragma unroll
      for (int i = 0; i < kWide; ++i) sum += to_float(v.at[i]) * to_float(v.at[i]);
    }
    return inverse_norm(warp_sum(sum));
  }

  // total += eight columns of the unit rows [begin, end), at most kBatch.
  __device__ __forceinline__ void add_units(float (&total)[kWide], int begin, int end, int column,
                                            const float* inverse) const {
#pragma unroll
    for (int row = 0; row < kBatch; ++row) {
      if (begin + row >= end) break;
      const Eight<T> v = load(begin + row, column);
#pragma unroll
      for (int i = 0; i < kWide; ++i) total[i] += to_float(v.at[i]) * inverse[row];
    }
  }
};

// 1. Norms, a warp a row, and the piece's sums of unit rows. A thread adds up the same columns of
// every batch, in shared memory where there is some, and leaves the last sums in memory.
template <typename T, typename Kept, Source kSource>
__global__ void __launch_bounds__(kThreads, 2) norm_kernel(BothRows<T, Kept> both, Images images) {
  GRACE_DYNAMIC_SHARED(shared);
  __shared__ float inverse[kBatch];
  wait_for_previous_kernel();
  const Rows<T, Kept> x = both.of(blockIdx.y);
  const Piece piece = piece_of<kPiece>(blockIdx.x, images);
  if (piece.image < 0) return;
  float* const out = x.sums + int64_t{blockIdx.x} * x.pitch;
  float* const sums = kSource == Source::kStaged ? reinterpret_cast<float*>(shared) : out;
  const PieceRows<T, Kept, kSource> rows = {x, piece.first,
                                            reinterpret_cast<T*>(shared + int64_t{x.pitch} * 4)};
  for (int begin = 0; begin < piece.count; begin += kBatch) {
    const int end = begin + kBatch < piece.count ? begin + kBatch : piece.count;
    rows.stage(begin, end);
    for (int row = begin + threadIdx.x / kWarpSize; row < end; row += kWarps) {
      const float own = rows.inverse_norm_of(row);
      if (threadIdx.x % kWarpSize == 0) x.inverse[piece.first + row] = inverse[row - begin] = own;
    }
    __syncthreads();
    for (int column = threadIdx.x * kWide; column < x.pitch; column += kThreads * kWide) {
      float total[kWide];
#pragma unroll
      for (int i = 0; i < kWide; ++i) total[i] = begin == 0 ? 0.0f : sums[column + i];
      rows.add_units(total, begin, end, column, inverse);
      store_eight((end == piece.count ? out : sums) + column, total);
    }
    __syncthreads();
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

// 3. The centered rows, and each one's product with the mean: kBatch rows a block. Backwards, from
// what norm_kernel has read last and may still be in the cache.
template <typename T, typename Kept, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    center_kernel(BothRows<T, Kept> both, Images images) {
  __shared__ float sums[kWarps][kBatch];
  wait_for_previous_kernel();
  const Rows<T, Kept> x = both.of(1 - static_cast<int>(blockIdx.y));
  const Piece piece = piece_of<kBatch>(static_cast<int>(gridDim.x - 1 - blockIdx.x), images);
  if (piece.image < 0) return;
  const float scale = row_scale(x.width);
  int rows[kBatch];  // one that is not there: the last one
  float inverse[kBatch], along[kBatch] = {};
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    rows[i] = piece.first + (i < piece.count ? i : piece.count - 1);
    inverse[i] = x.inverse[rows[i]];
  }
  for (int column = threadIdx.x * kWide; column < x.pitch; column += kThreads * kWide) {
    Eight<T> raw[kBatch];
#pragma unroll
    for (int row = 0; row < kBatch; ++row) raw[row] = x.template load<kAligned>(rows[row], column);
    const auto mean =
        *reinterpret_cast<const Eight<float>*>(x.means + int64_t{piece.image} * x.pitch + column);
#pragma unroll
    for (int row = 0; row < kBatch; ++row) {
      float v[kWide];
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const float centered = to_float(raw[row].at[i]) * inverse[row] - mean.at[i];
        along[row] += centered * mean.at[i];
        v[i] = centered * scale;
      }
      if (row < piece.count) store_eight(x.kept + int64_t{rows[row]} * x.pitch + column, v);
    }
  }
  if (x.along == nullptr) return;
#pragma unroll
  for (int row = 0; row < kBatch; ++row) {
    const float sum = warp_sum(along[row]);
    if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize][row] = sum;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= piece.count) return;
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += sums[i][threadIdx.x];
  x.along[piece.first + static_cast<int>(threadIdx.x)] = total;
}

template <typename T, typename Kept, Source kSource>
void launch_rows(const BothRows<T, Kept>& both, const Images& images, size_t shared_bytes,
                 int device) {
  const int pieces = images.piece_bound<kPiece>();
  const int pitch =
      both.student.pitch > both.teacher.pitch ? both.student.pitch : both.teacher.pitch;
  const auto columns = static_cast<unsigned>(ceil_div(pitch, kMeanColumns));
  const auto shape = [](dim3 grid, size_t bytes) {
    return LaunchShape{grid, kThreads, bytes, true};
  };
  launch(norm_kernel<T, Kept, kSource>, shape(dim3(pieces, 2), shared_bytes), device, both, images);
  launch(mean_kernel<T, Kept>, shape(dim3(images.count, columns, 2), 0), device, both, images);
  launch(center_kernel<T, Kept, kSource != Source::kElements>,
         shape(dim3(images.piece_bound<kBatch>(), 2), 0), device, both, images);
}

// `aligned`: both models' rows are. `most_bytes` of shared memory that a block can have.
template <typename T, typename Kept>
void launch_rows(const BothRows<T, Kept>& both, const Images& images, bool aligned, int most_bytes,
                 int device) {
  if (!aligned) return launch_rows<T, Kept, Source::kElements>(both, images, 0, device);
  if constexpr (sizeof(T) == 2) {
    const int64_t s = staged_bytes<T>(both.student.pitch), t = staged_bytes<T>(both.teacher.pitch);
    const int64_t bytes = s > t ? s : t;
    if (bytes <= most_bytes)
      return launch_rows<T, Kept, Source::kStaged>(both, images, static_cast<size_t>(bytes),
                                                   device);
  }
  launch_rows<T, Kept, Source::kAligned>(both, images, 0, device);
}

}  // namespace grace::cka
