// Arithmetic and indexing of cka, the same on every device (see grace/ops/cka.py for the formulas).
#pragma once

#include <cmath>

#include "common/numeric.h"

namespace grace::cka {

// Columns of `saved`, one row an image.
enum Saved { kHsicBoth, kHsicStudent, kHsicTeacher, kCounted, kSavedColumns };

// Of a Gram's norm, a row: an image whose rows are equal up to rounding does not count.
constexpr float kDegenerate = 1e-10f;

// The images' places among all rows. Bounds are clamped, so that wrong ones cannot lead outside.
struct Images {
  const int* bounds;  // [count + 1]
  int count;
  int rows;

  GRACE_HOST_DEVICE int bound(int image) const {
    const int at = bounds[image];
    return at < 0 ? 0 : (at > rows ? rows : at);
  }

  GRACE_HOST_DEVICE int length(int image) const {
    const int n = bound(image + 1) - bound(image);
    return n < 0 ? 0 : n;
  }

  // Pieces of kRows rows of all images are numbered without knowing their lengths on the host: an
  // image that begins at row b has those from b / kRows + image on. Its last one lies below where
  // the next image's begin, and all lie below piece_bound().
  template <int kRows>
  GRACE_HOST_DEVICE int first_piece(int image) const {
    return bound(image) / kRows + image;
  }

  template <int kRows>
  GRACE_HOST_DEVICE int pieces(int image) const {
    return (length(image) + kRows - 1) / kRows;
  }

  template <int kRows>
  GRACE_HOST_DEVICE int piece_bound() const {
    return rows / kRows + count;
  }

  // The last image whose `key` is at most `value`, -1 if there is none.
  template <typename Key>
  GRACE_HOST_DEVICE int last_at_most(int value, const Key& key) const {
    int below = -1, above = count;
    while (above - below > 1) {
      const int middle = (below + above) / 2;
      if (key(middle) <= value) {
        below = middle;
      } else {
        above = middle;
      }
    }
    return below;
  }

  // The image that a row lies in, -1 for none.
  GRACE_HOST_DEVICE int image_of_row(int row) const {
    const int image = last_at_most(row, [&](int i) { return bound(i); });
    return image >= 0 && row < bound(image + 1) ? image : -1;
  }
};

// At most kRows rows of an image; `image` is -1 for a number that no image uses.
struct Piece {
  int image;
  int index;  // within the image
  int first;  // row, among all rows
  int count;  // of rows
};

template <int kRows>
GRACE_HOST_DEVICE Piece piece_of(int number, const Images& images) {
  const int image =
      images.last_at_most(number, [&](int i) { return images.first_piece<kRows>(i); });
  if (image < 0) return {-1, 0, 0, 0};
  const int index = number - images.first_piece<kRows>(image);
  const int left = images.length(image) - index * kRows;
  if (left <= 0) return {-1, 0, 0, 0};
  return {image, index, images.bound(image) + index * kRows, left < kRows ? left : kRows};
}

// What centered unit rows are multiplied by where they are kept, 2^floor(log2(sqrt(width))): their
// elements are then near 1, where fp16 has all its digits.
GRACE_HOST_DEVICE float row_scale(int width) {
  float scale = 1.0f;
  for (; width >= 4; width /= 4) scale *= 2.0f;
  return scale;
}

// Elements from one kept row to the next: a multiple of 16 bytes, zeros behind the row.
GRACE_HOST_DEVICE int kept_pitch(int width) { return (width + 7) / 8 * 8; }

GRACE_HOST_DEVICE float inverse_norm(float sum_of_squares) {
  const float norm = sqrtf(sum_of_squares);
  return norm > 0.0f ? 1.0f / norm : 0.0f;
}

// NaN counts, so that it is seen.
GRACE_HOST_DEVICE bool counts(float hsic_student, float hsic_teacher, int n, int min_tokens) {
  const float least = kDegenerate * static_cast<float>(n);
  return n >= min_tokens && !(sqrtf(hsic_student) <= least) && !(sqrtf(hsic_teacher) <= least);
}

GRACE_HOST_DEVICE float alignment(float both, float student, float teacher) {
  return both / (sqrtf(student) * sqrtf(teacher));
}

// What forward returns of each image.
struct Values {
  float* value;  // [images]
  float* saved;  // [images, kSavedColumns]
  Images images;
  int min_tokens;

  GRACE_HOST_DEVICE void write(int image, const float (&hsic)[3]) const {
    const int n = images.length(image);
    const bool counted = counts(hsic[kHsicStudent], hsic[kHsicTeacher], n, min_tokens);
    value[image] =
        counted ? alignment(hsic[kHsicBoth], hsic[kHsicStudent], hsic[kHsicTeacher]) : 1.0f;
    float* const to = saved + image * kSavedColumns;
    for (int i = 0; i < 3; ++i) to[i] = n >= min_tokens ? hsic[i] : 0.0f;
    to[kCounted] = counted ? 1.0f : 0.0f;
  }
};

// The gradient in centered rows is factor * (L - ratio K) S of the centered Grams K and L.
struct Factors {
  float factor;
  float ratio;
};

GRACE_HOST_DEVICE Factors gradient_factors(const float* saved, float grad) {
  return {2.0f * grad / (sqrtf(saved[kHsicStudent]) * sqrtf(saved[kHsicTeacher])),
          saved[kHsicBoth] / saved[kHsicStudent]};
}

}  // namespace grace::cka
