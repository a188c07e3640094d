// Arithmetic and indexing of cka, the same on every device (see grace/ops/cka.py for the formulas).
#pragma once

#include <cmath>

#include "common/numeric.h"

namespace grace::cka {

// Tokens along each side of a tile of a Gram matrix.
constexpr int kTile = 64;

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

  // Tile rows of all images are numbered without knowing their lengths on the host: an image that
  // begins at row b has those from b / kTile + image on. Its last one lies below where the next
  // image's begin, and all lie below rows / kTile + count.
  GRACE_HOST_DEVICE int first_tile(int image) const { return bound(image) / kTile + image; }

  GRACE_HOST_DEVICE int tiles(int image) const { return (length(image) + kTile - 1) / kTile; }

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

// A tile row of an image; `image` is -1 for a number that no image uses.
struct TileRow {
  int image;
  int index;  // within the image
};

GRACE_HOST_DEVICE TileRow tile_row_of(int number, const Images& images) {
  const int image = images.last_at_most(number, [&](int i) { return images.first_tile(i); });
  if (image < 0) return {-1, 0};
  const int index = number - images.first_tile(image);
  return index < images.tiles(image) ? TileRow{image, index} : TileRow{-1, 0};
}

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

// The gradient is (teacher L + student K) S of the centered Grams L and K and the centered rows S.
struct Factors {
  float student;
  float teacher;
};

GRACE_HOST_DEVICE Factors gradient_factors(const float* saved, float grad) {
  const float teacher = 2.0f * grad / (sqrtf(saved[kHsicStudent]) * sqrtf(saved[kHsicTeacher]));
  return {-teacher * saved[kHsicBoth] / saved[kHsicStudent], teacher};
}

}  // namespace grace::cka
