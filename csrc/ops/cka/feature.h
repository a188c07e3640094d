// Products of features, for images with at least as many rows as both widths together. Forward: the
// tiles of TᵀS, SᵀS and TᵀT, the latter two on and above the diagonal, each leave a sum of squares.
// Backward: TᵀS and -(a/b) SᵀS are kept in fp16, of one image at a time, and multiplied by T and S.
#pragma once

#include "ops/cka/gram.h"

namespace grace::cka {

struct FeatureArguments {
  const fp16* student;  // kept rows
  const fp16* teacher;
  int student_width;
  int teacher_width;
  Images images;
  float* sums;  // forward: [slots, feature_tiles()]
  // backward
  const float* saved;  // [images, kSavedColumns]
  fp16* products;      // [teacher_width, pitch] of TᵀS, then [student_width, pitch] of SᵀS
  int slot;

  GRACE_HOST_DEVICE int widths() const { return student_width + teacher_width; }
  GRACE_HOST_DEVICE int student_tiles() const { return (student_width + kTile - 1) / kTile; }
  GRACE_HOST_DEVICE int teacher_tiles() const { return (teacher_width + kTile - 1) / kTile; }
  GRACE_HOST_DEVICE int cross_tiles() const { return student_tiles() * teacher_tiles(); }
  GRACE_HOST_DEVICE int tiles() const {
    return cross_tiles() + pairs_of(student_tiles()) + pairs_of(teacher_tiles());
  }

  // Such an image begins among rows slot * widths() and the next widths() - 1, and no other does.
  GRACE_HOST_DEVICE int slots() const { return images.rows / widths(); }
  GRACE_HOST_DEVICE bool is_feature(int image) const { return images.length(image) >= widths(); }
  GRACE_HOST_DEVICE int slot_of(int image) const { return images.bound(image) / widths(); }
  GRACE_HOST_DEVICE int image_of(int of_slot) const {
    const int last = (of_slot + 1) * widths() - 1;
    const int image = images.last_at_most(last, [&](int i) { return images.bound(i); });
    return image >= 0 && image < images.count && slot_of(image) == of_slot && is_feature(image)
               ? image
               : -1;
  }
};

// A tile of one of the three products: rows are features of model `left`, columns of `right`.
struct FeatureTile {
  int left, right;  // 0 student, 1 teacher
  int i, j;
};

__device__ __forceinline__ FeatureTile symmetric_tile(int model, int number, int tiles) {
  int i = 0;
  for (; number >= tiles - i; ++i) number -= tiles - i;
  return {model, model, i, i + number};
}

__device__ __forceinline__ FeatureTile feature_tile(const FeatureArguments& x, int number) {
  const int s = x.student_tiles(), t = x.teacher_tiles();
  if (number < s * t) return {1, 0, number / s, number % s};
  number -= s * t;
  if (number < pairs_of(s)) return symmetric_tile(0, number, s);
  return symmetric_tile(1, number - pairs_of(s), t);
}

__device__ __forceinline__ Operand feature_operand(const FeatureArguments& x, int model, int image,
                                                   int index) {
  const int pitch = kept_pitch(model == 0 ? x.student_width : x.teacher_width);
  const int left = pitch - index * kTile;
  const int64_t begin = x.images.bound(image);
  return turned((model == 0 ? x.student : x.teacher) + begin * pitch + index * kTile, pitch,
                left < kTile ? left : kTile, x.images.length(image));
}

// Divides the products so that their elements are near 1, at most √(ds dt), however correlated:
// |TᵀS| is √a, (a/b) |SᵀS| is a/√b. And so that the kept rows' scales cancel.
struct ProductScale {
  float cross;
  float own;
  float factor;  // of the gradient in centered rows, over what cross and own make
};

__device__ __forceinline__ ProductScale product_scale(const FeatureArguments& x, int image,
                                                      float grad) {
  const float* kept = x.saved + image * kSavedColumns;
  const Factors factors = gradient_factors(kept, grad);
  const float cross = sqrtf(kept[kHsicBoth]), own = factors.ratio * sqrtf(kept[kHsicStudent]);
  const float largest = cross > own ? cross : own;
  const float widths =
      sqrtf(static_cast<float>(x.student_width)) * sqrtf(static_cast<float>(x.teacher_width));
  const float scale = largest > 0.0f ? widths / largest : 1.0f;
  const float s = row_scale(x.student_width), t = row_scale(x.teacher_width);
  return {scale / (t * t * s), -factors.ratio * scale / (s * s * s), factors.factor / scale};
}

__device__ __forceinline__ void write_product(const FeatureArguments& x, const FeatureTile& at,
                                              const Accumulator& tile, float scale) {
  const int pitch = kept_pitch(x.student_width);
  const int height = at.left == 0 ? x.student_width : x.teacher_width;
  fp16* const to = x.products + (at.left == 0 ? int64_t{x.teacher_width} * pitch : 0);
  const bool mirrored = at.left == at.right && at.i != at.j;
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int j = 0; j < kAcross; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = at.i * kTile + fragment_row(i, threadIdx.x) + e / 2 * 8;
        const int column = at.j * kTile + fragment_column(j, threadIdx.x) + e % 2;
        if (row >= height || column >= pitch) continue;
        const fp16 value = from_float<fp16>(tile[i][j][e] * scale);
        to[int64_t{row} * pitch + column] = value;
        if (mirrored && column < height) to[int64_t{column} * pitch + row] = value;
      }
}

template <bool kBackward>
__global__ void __launch_bounds__(kGroup, 2) feature_kernel(FeatureArguments x) {
  wait_for_previous_kernel();
  GRACE_DYNAMIC_SHARED(shared);
  __shared__ float scratch[kGroup / kWarpSize];
  const int slot = kBackward ? x.slot : static_cast<int>(blockIdx.y);
  const int image = x.image_of(slot);
  if (image < 0) return;
  if (kBackward && x.saved[image * kSavedColumns + kCounted] == 0.0f) return;

  const FeatureTile at = feature_tile(x, blockIdx.x);
  Accumulator tile = {};
  const Operand a = feature_operand(x, at.left, image, at.i);
  const bool diagonal = at.left == at.right && at.i == at.j;
  add_product<true, true>(tile, a, feature_operand(x, at.right, image, at.j), diagonal,
                          stages_of(a), shared);
  if constexpr (kBackward) {
    const ProductScale scale = product_scale(x, image, 0.0f);
    write_product(x, at, tile, at.left == at.right ? scale.own : scale.cross);
  } else {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum += tile[i][j][e] * tile[i][j][e];
    const float total = block_sum<kGroup>(sum, scratch);
    const float scale = row_scale(at.left == 0 ? x.student_width : x.teacher_width) *
                        row_scale(at.right == 0 ? x.student_width : x.teacher_width);
    const float weight = at.left == at.right && at.i != at.j ? 2.0f : 1.0f;
    if (threadIdx.x == 0)
      x.sums[int64_t{slot} * x.tiles() + blockIdx.x] = weight * total / (scale * scale);
  }
}

// G / factor = T (TᵀS) - (a/b) S (SᵀS), left in fp16 where the gradient will be: a tile a block.
__global__ void __launch_bounds__(kGroup, 2)
    feature_direction_kernel(FeatureArguments x, fp16* out) {
  wait_for_previous_kernel();
  GRACE_DYNAMIC_SHARED(shared);
  const Piece piece = piece_of<kTile>(blockIdx.x, x.images);
  if (piece.image < 0 || !x.is_feature(piece.image) || x.slot_of(piece.image) != x.slot) return;
  if (x.saved[piece.image * kSavedColumns + kCounted] == 0.0f) return;
  const int pitch = kept_pitch(x.student_width), first_column = blockIdx.y * kTile;
  const int columns = pitch - first_column < kTile ? pitch - first_column : kTile;
  const auto product = [&](const fp16* rows, int width, const fp16* with) {
    const int own = kept_pitch(width);
    return std::pair{plain(rows + int64_t{piece.first} * own, own, piece.count, width),
                     turned(with + first_column, pitch, columns, width)};
  };

  Accumulator tile = {};
  const auto cross = product(x.teacher, x.teacher_width, x.products);
  add_product<false, true>(tile, cross.first, cross.second, false, stages_of(cross.first), shared);
  const auto own =
      product(x.student, x.student_width, x.products + int64_t{x.teacher_width} * pitch);
  add_product<false, true>(tile, own.first, own.second, false, stages_of(own.first), shared);
  auto* const g = reinterpret_cast<float*>(shared);
  store_tile(g, tile);
  __syncthreads();
  const int width = x.student_width;
  const int column = first_column + static_cast<int>(threadIdx.x);
  if (column >= width) return;
  for (int row = 0; row < piece.count; ++row)
    out[int64_t{piece.first + row} * width + column] =
        from_float<fp16>(g[row * kSharedPitch + threadIdx.x]);
}

// Through the normalization, in place: a warp a row. Rows of images that do not count get 0.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    feature_normalization_kernel(FeatureArguments x, const T* student, const float* inverse,
                                 const float* grad, T* out) {
  wait_for_previous_kernel();
  const int row = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int image = row < x.images.rows ? x.images.image_of_row(row) : -1;
  if (image < 0 || !x.is_feature(image)) return;
  const int lane = threadIdx.x % kWarpSize, width = x.student_width;
  T* const to = out + int64_t{row} * width;
  const auto* const g = reinterpret_cast<const fp16*>(to);
  const T* const raw = student + int64_t{row} * width;
  const bool counted = x.saved[image * kSavedColumns + kCounted] != 0.0f;
  float along = 0.0f;
  if (counted)
#pragma unroll 8
    for (int i = lane; i < width; i += kWarpSize) along += to_float(g[i]) * to_float(raw[i]);
  const float own = inverse[row];
  along = warp_sum(along) * own;
  const float factor = product_scale(x, image, grad[image]).factor * own;
#pragma unroll 8
  for (int i = lane; i < width; i += kWarpSize) {
    const float value = (to_float(g[i]) - to_float(raw[i]) * own * along) * factor;
    to[i] = from_float<T>(counted ? value : 0.0f);
  }
}

}  // namespace grace::cka
