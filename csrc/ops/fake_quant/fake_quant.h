// Arithmetic of fake_quant, the same on every device (see grace/ops/fake_quant.py for the
// formulas).
#pragma once

#include <cmath>

#include "common/numeric.h"

namespace grace::fake_quant {

// The grid that scales are rounded to: what the packed checkpoint stores.
enum class ScaleGrid { kFloat32, kBFloat16, kFloat16 };

// Exactly representable in bf16 and fp16 alike, so that one set of scales fits every format.
constexpr float kMinScale = 0x1p-17f;

struct Codes {
  float min;  // -2^(bits-1)
  float max;  // 2^(bits-1) - 1
};

GRACE_HOST_DEVICE Codes codes_of(int bits) {
  const auto half = static_cast<float>(1 << (bits - 1));
  return {-half, half - 1.0f};
}

// exp in double: one a group, and its rounding to fp32 is then the same on a CPU and on a GPU.
GRACE_HOST_DEVICE float scale_of(float log_scale, ScaleGrid grid) {
  float scale = static_cast<float>(exp(static_cast<double>(log_scale)));
  if (grid == ScaleGrid::kBFloat16) scale = round_through<bf16>(scale);
  if (grid == ScaleGrid::kFloat16) scale = round_through<fp16>(scale);
  return scale < kMinScale ? kMinScale : scale;
}

// Compared with < and >, not fmin and fmax, so that NaN passes through.
GRACE_HOST_DEVICE float clamp_code(float rounded, Codes codes) {
  return rounded < codes.min ? codes.min : (rounded > codes.max ? codes.max : rounded);
}

GRACE_HOST_DEVICE float fake_quantize(float weight, float scale, Codes codes) {
  return clamp_code(rintf(weight / scale), codes) * scale;
}

struct Gradient {
  float weight;
  float log_scale;  // this element's part of the group's sum
};

GRACE_HOST_DEVICE Gradient gradient_of(float grad, float weight, float scale, Codes codes) {
  const float value = weight / scale;
  const float rounded = rintf(value);
  const float code = clamp_code(rounded, codes);
  // The end codes are inside: only what rounds beyond them is cut off.
  const bool inside = codes.min <= rounded && rounded <= codes.max;
  return {inside ? grad : 0.0f, grad * scale * (inside ? code - value : code)};
}

}  // namespace grace::fake_quant
