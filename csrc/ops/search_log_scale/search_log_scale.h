// The candidates of search_log_scale and how one is judged (see grace/ops/search_log_scale.py).
#pragma once

#include <cmath>

#include "ops/fake_quant/fake_quant.h"

namespace grace::search_log_scale {

using fake_quant::Codes;
using fake_quant::ScaleGrid;

constexpr int kCandidates = 91;
constexpr int kFirst = 30;  // hundredths of absmax / codes.max: 0.30, 0.31, …, 1.20

// log in double: its rounding to fp32 is then the same on a CPU and on a GPU.
GRACE_HOST_DEVICE float log_scale_of(float scale) {
  return static_cast<float>(
      log(static_cast<double>(scale < fake_quant::kMinScale ? fake_quant::kMinScale : scale)));
}

// The reference multiplies absmax by a ratio rounded to fp32.
GRACE_HOST_DEVICE float candidate(float absmax, int i, Codes codes) {
  const double ratio = static_cast<double>(kFirst + i) / 100.0 / static_cast<double>(codes.max);
  return log_scale_of(absmax * static_cast<float>(ratio));
}

// Squared errors of one scale, added up weight by weight. A quotient that rounds to the other side
// of a tie has the same error, so a reciprocal will do; adding 1.5 * 2^23 rounds to an integer.
struct Judge {
  static constexpr float kRound = 0x1.8p23f;
  float scale, reciprocal, low, high;

  GRACE_HOST_DEVICE Judge(float scale, Codes codes)
      : scale(scale), reciprocal(1.0f / scale), low(kRound + codes.min), high(kRound + codes.max) {}

  GRACE_HOST_DEVICE float add(float sum, float weight) const {
    const float rounded = fminf(fmaxf(fmaf(weight, reciprocal, kRound), low), high);
    const float error = fmaf(rounded - kRound, scale, -weight);
    return fmaf(error, error, sum);
  }
};

}  // namespace grace::search_log_scale
