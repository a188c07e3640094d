// The arithmetic of an RMS norm: what rms_norm and rotary share.
#pragma once

#include <cmath>

#include "common/numeric.h"

namespace grace::rms_norm {

GRACE_HOST_DEVICE float inverse_sqrt(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

struct Norm {
  float per_column;  // 1 / columns
  float eps;

  Norm(int64_t columns, double eps_)
      : per_column(1.0f / static_cast<float>(columns)), eps(static_cast<float>(eps_)) {}

  // What a row is multiplied by, beside the weight.
  GRACE_HOST_DEVICE float factor(float sum_of_squares) const {
    return inverse_sqrt(sum_of_squares * per_column + eps);
  }
};

}  // namespace grace::rms_norm
