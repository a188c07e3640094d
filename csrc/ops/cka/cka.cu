// cka on CUDA. Forward: norms of rows, means of columns, then one pass over the tiles of all
// images' Grams, of which only three sums a block leave the chip. Backward: the Gram's part of the
// gradient is made kStrip columns at a time and multiplied into rows that one block owns. Nothing
// grows with the square of an image, nothing is added atomically, and the host knows no image's
// length.
#include "common/launch.h"
#include "common/warp.h"
#include "ops/cka/cka.h"

namespace grace::cka {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSide = 16;             // threads along each side of a tile
constexpr int kEach = kTile / kSide;  // values along each side that a thread keeps
constexpr int kDepth = 32;            // of a product, in shared memory at a time
constexpr int kTileColumns = 32;      // blocks that share one row of tiles
constexpr int kStrip = 512;           // columns of the Grams' difference in memory at a time
constexpr int kStripTiles = kStrip / kTile;

static_assert(kSide * kSide == kThreads);

// Rows of one model, L2-normalized and centered when they are read.
template <typename T>
struct Centered {
  const T* rows;         // [rows, width]
  const float* inverse;  // [rows], 1 / norm
  const float* means;    // [images, width], of the normalized rows
  int width;

  __device__ __forceinline__ float unit(int row, int column) const {
    return to_float(rows[int64_t{row} * width + column]) * inverse[row];
  }

  // 0 at and beyond the image's end and the row's.
  __device__ __forceinline__ float at(int image, int row, int end, int column) const {
    if (row >= end || column >= width) return 0.0f;
    return unit(row, column) - means[int64_t{image} * width + column];
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
template <typename T>
__device__ void gram_tile(const Centered<T>& x, int image, int first, int second, int end,
                          Operands& shared, Tile& tile) {
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) tile[i][j] = 0.0f;
  const int lane = threadIdx.x % kDepth;
  for (int depth = 0; depth < x.width; depth += kDepth) {
    for (int row = threadIdx.x / kDepth; row < kTile; row += kThreads / kDepth) {
      shared.a[row][lane] = x.at(image, first + row, end, depth + lane);
      shared.b[row][lane] = x.at(image, second + row, end, depth + lane);
    }
    __syncthreads();
    shared.multiply_into(tile);
    __syncthreads();
  }
}

// 1. Norms: a warp a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) inverse_norm_kernel(const T* x,      // [rows, width]
                                                                float* inverse,  // [rows]
                                                                int rows, int width) {
  const int row = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int column = threadIdx.x % kWarpSize; column < width; column += kWarpSize) {
    const float value = to_float(x[int64_t{row} * width + column]);
    sum += value * value;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) inverse[row] = inverse_norm(sum);
}

// 2. Means: a block an image and a warp's width of columns; its warps share the rows.
template <typename T>
__global__ void __launch_bounds__(kThreads) column_mean_kernel(Centered<T> x,
                                                               float* means,  // [images, width]
                                                               Images images) {
  __shared__ float sums[kWarps][kWarpSize];
  const int image = blockIdx.x;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int column = static_cast<int>(blockIdx.y) * kWarpSize + lane;
  const int n = images.length(image), begin = images.bound(image);
  float sum = 0.0f;
  if (column < x.width)
    for (int row = warp; row < n; row += kWarps) sum += x.unit(begin + row, column);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= x.width) return;
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += sums[i][lane];
  means[int64_t{image} * x.width + column] = n > 0 ? total / static_cast<float>(n) : 0.0f;
}

// 3. Products of Grams: a block has one row of tiles and every kTileColumns-th tile of it, on and
// above the diagonal; what is above counts twice.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    hsic_kernel(Centered<T> student, Centered<T> teacher,
                float* sums,  // [tile rows, kTileColumns, 3]
                Images images) {
  __shared__ Operands shared;
  __shared__ float scratch[kWarps];
  float* const out = sums + (int64_t{blockIdx.x} * kTileColumns + blockIdx.y) * 3;
  const TileRow row = tile_row_of(blockIdx.x, images);
  const int tiles = row.image < 0 ? 0 : images.tiles(row.image);
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
    gram_tile(student, row.image, first, second, end, shared, k);
    gram_tile(teacher, row.image, first, second, end, shared, l);
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

// 4. A block an image: its blocks' sums, in a fixed order, and CKA.
__global__ void __launch_bounds__(kThreads) value_kernel(const float* sums,
                                                         float* value,  // [images]
                                                         float* saved,  // [images, kSavedColumns]
                                                         Images images, int min_tokens) {
  __shared__ float scratch[kWarps];
  const int image = blockIdx.x;
  const int64_t first = int64_t{images.first_tile(image)} * kTileColumns;
  const int count = images.tiles(image) * kTileColumns;
  float hsic[3];
  for (int which = 0; which < 3; ++which) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += kThreads) sum += sums[(first + i) * 3 + which];
    hsic[which] = block_sum<kThreads>(sum, scratch);
  }
  if (threadIdx.x != 0) return;
  const int n = images.length(image);
  const bool counted = counts(hsic[kHsicStudent], hsic[kHsicTeacher], n, min_tokens);
  value[image] =
      counted ? alignment(hsic[kHsicBoth], hsic[kHsicStudent], hsic[kHsicTeacher]) : 1.0f;
  for (int i = 0; i < 3; ++i) saved[image * kSavedColumns + i] = n >= min_tokens ? hsic[i] : 0.0f;
  saved[image * kSavedColumns + kCounted] = counted ? 1.0f : 0.0f;
}

// 5. One strip of the Grams' weighted difference: a block a tile. Row r of `difference` belongs to
// row r of the student, its columns to the strip's rows of the same image; 0 beyond the image.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    difference_kernel(Centered<T> student, Centered<T> teacher,
                      const float* grad,   // [images]
                      const float* saved,  // [images, kSavedColumns]
                      float* difference,   // [rows, kStrip]
                      int strip, Images images) {
  __shared__ Operands shared;
  const TileRow row = tile_row_of(blockIdx.x, images);
  if (row.image < 0) return;
  const float* kept = saved + row.image * kSavedColumns;
  const int begin = images.bound(row.image), end = begin + images.length(row.image);
  const int first = begin + row.index * kTile;
  const int second = begin + strip * kStrip + static_cast<int>(blockIdx.y) * kTile;
  if (kept[kCounted] == 0.0f || second >= end) return;
  const Factors factors = gradient_factors(kept, grad[row.image]);
  Tile k, l;
  gram_tile(student, row.image, first, second, end, shared, k);
  gram_tile(teacher, row.image, first, second, end, shared, l);
  for (int i = 0; i < kEach; ++i) {
    const int at = first + tile_y() + kSide * i;
    if (at >= end) return;
    for (int j = 0; j < kEach; ++j)
      difference[int64_t{at} * kStrip + blockIdx.y * kTile + tile_x() + kSide * j] =
          factors.teacher * l[i][j] + factors.student * k[i][j];
  }
}

// 6. direction (+)= strip of the difference · the strip's centered rows: a block owns a tile of it.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    direction_kernel(Centered<T> student,
                     const float* saved,       // [images, kSavedColumns]
                     const float* difference,  // [rows, kStrip]
                     float* direction,         // [rows, width]
                     int strip, Images images) {
  __shared__ Operands shared;
  const TileRow row = tile_row_of(blockIdx.x, images);
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
      shared.b[at][k] = student.at(row.image, second + depth + k, end, first_column + at);
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

// 7. Through the normalization: a warp a row. Rows in no image that counts get 0.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalization_backward_kernel(Centered<T> student,
                                  const float* saved,      // [images, kSavedColumns]
                                  const float* direction,  // [rows, width]
                                  T* grad_student,         // [rows, width]
                                  Images images) {
  const int row = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= images.rows) return;
  const int lane = threadIdx.x % kWarpSize;
  const int image = images.image_of_row(row);
  const bool counted = image >= 0 && saved[image * kSavedColumns + kCounted] != 0.0f;
  const float* g = direction + int64_t{row} * student.width;
  T* out = grad_student + int64_t{row} * student.width;
  float along = 0.0f;
  if (counted)
    for (int i = lane; i < student.width; i += kWarpSize) along += g[i] * student.unit(row, i);
  along = warp_sum(along);
  for (int i = lane; i < student.width; i += kWarpSize) {
    const float value = (g[i] - student.unit(row, i) * along) * student.inverse[row];
    out[i] = from_float<T>(counted ? value : 0.0f);
  }
}

Tensor empty_float(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

Images images_of(const Tensor& x, const Tensor& cu_seqlens) {
  return {data<int>(cu_seqlens), static_cast<int>(cu_seqlens.size(0) - 1),
          static_cast<int>(x.size(0))};
}

int tile_rows(const Images& images) { return images.rows / kTile + images.count; }

LaunchShape row_shape(const Images& images) {
  return {dim3(ceil_div(images.rows, kWarps)), kThreads};
}

// Norms and means of one model's rows, and the tensors that hold them.
template <typename T>
struct Prepared {
  Tensor inverse;
  Tensor means;
  Centered<T> rows;

  Prepared(const Tensor& x, const Images& images)
      : inverse(empty_float(x, {x.size(0)})),
        means(empty_float(x, {images.count, x.size(1)})),
        rows{data<T>(x), data<float>(inverse), data<float>(means), static_cast<int>(x.size(1))} {
    launch(inverse_norm_kernel<T>, row_shape(images), device_of(x), rows.rows, data<float>(inverse),
           images.rows, rows.width);
    launch(column_mean_kernel<T>, {dim3(images.count, ceil_div(rows.width, kWarpSize)), kThreads},
           device_of(x), rows, data<float>(means), images);
  }
};

// student [T, ds] and teacher [T, dt] of one dtype, cu_seqlens int32 [B + 1], contiguous: checked
// in Python.
std::tuple<Tensor, Tensor> cka_cuda(const Tensor& student, const Tensor& teacher,
                                    const Tensor& cu_seqlens, int64_t min_tokens) {
  const Images images = images_of(student, cu_seqlens);
  const int device = device_of(student);
  Tensor value = empty_float(student, {images.count});
  Tensor saved = empty_float(student, {images.count, kSavedColumns});
  Tensor sums = empty_float(student, {tile_rows(images), kTileColumns, 3});
  dispatch_floating(student.scalar_type(), "cka", [&](auto element) {
    using T = decltype(element);
    const Prepared<T> s(student, images), t(teacher, images);
    launch(hsic_kernel<T>, {dim3(tile_rows(images), kTileColumns), kThreads}, device, s.rows,
           t.rows, data<float>(sums), images);
  });
  launch(value_kernel, {dim3(images.count), kThreads}, device, data<float>(sums),
         data<float>(value), data<float>(saved), images, static_cast<int>(min_tokens));
  return {value, saved};
}

Tensor cka_backward_cuda(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                         const Tensor& cu_seqlens, const Tensor& saved) {
  const Images images = images_of(student, cu_seqlens);
  const int device = device_of(student);
  const auto column_tiles = static_cast<unsigned>(ceil_div<int64_t>(student.size(1), kTile));
  Tensor grad_student = torch::stable::empty_like(student);
  Tensor direction = empty_float(student, {student.size(0), student.size(1)});
  Tensor difference = empty_float(student, {student.size(0), kStrip});
  dispatch_floating(student.scalar_type(), "cka_backward", [&](auto element) {
    using T = decltype(element);
    const Prepared<T> s(student, images), t(teacher, images);
    // The host does not know the images' lengths: strips that no image reaches end at once.
    for (int strip = 0; strip < ceil_div(images.rows, kStrip); ++strip) {
      launch(difference_kernel<T>, {dim3(tile_rows(images), kStripTiles), kThreads}, device, s.rows,
             t.rows, data<float>(grad), data<float>(saved), data<float>(difference), strip, images);
      launch(direction_kernel<T>, {dim3(tile_rows(images), column_tiles), kThreads}, device, s.rows,
             data<float>(saved), data<float>(difference), data<float>(direction), strip, images);
    }
    launch(normalization_backward_kernel<T>, row_shape(images), device, s.rows, data<float>(saved),
           data<float>(direction), data<T>(grad_student), images);
  });
  return grad_student;
}

}  // namespace
}  // namespace grace::cka

GRACE_CUDA_KERNELS(m) {
  m.impl("cka", TORCH_BOX(&grace::cka::cka_cuda));
  m.impl("cka_backward", TORCH_BOX(&grace::cka::cka_backward_cuda));
}
