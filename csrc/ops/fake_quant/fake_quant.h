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

// Division by one scale without a division: constants made once, then four instructions a weight.
//
// With y = 1/s rounded and z = 1/s - y rounded, w*y + w*z is w/s up to 2^-46 of it before its one
// rounding, hence one of the two floats around w/s. The remainder w - s*v is then exact, and
// v + (w - s*v)*y rounds to the float nearest to w/s (Markstein's theorem, which wants y correctly
// rounded): the same bits as an IEEE division, while nothing overflows or underflows. Quotients
// below 1/2 may underflow on the way; they round to the code 0 all the same.
struct Divisor {
  float scale;
  float reciprocal;
  float rest;

  // Beyond, reciprocals of bounds and remainders leave the range of fp32. False for NaN.
  GRACE_HOST_DEVICE bool regular() const { return scale <= 0x1p96f; }

  // For |weight| within 2^9 scales; infinities are not.
  GRACE_HOST_DEVICE float divide(float weight) const {
    const float near = fmaf(weight, reciprocal, weight * rest);
    return fmaf(fmaf(-scale, near, weight), reciprocal, near);
  }
};

GRACE_HOST_DEVICE Divisor divisor_of(float scale) {
  const float reciprocal = 1.0f / scale;
  return {scale, reciprocal, fmaf(-scale, reciprocal, 1.0f) * reciprocal};
}

// x within [low, high]; NaN stays NaN.
GRACE_HOST_DEVICE float clamp_between(float x, float low, float high) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(high));
  return x;
#else
  return x < low ? low : (x > high ? high : x);
#endif
}

// What rounds to the code of a weight. Weights are cut off at the end codes before they are
// divided, which rounds to the same codes as cutting off after it and needs no second look at
// infinities.
GRACE_HOST_DEVICE float value_within(float weight, const Divisor& by, Codes codes) {
  return by.divide(clamp_between(weight, codes.min * by.scale, codes.max * by.scale));
}

// A code, or a quotient within the codes, plus 2^(bits-1), in the low byte: adding 1.5 * 2^23
// rounds to an integer, half to even.
GRACE_HOST_DEVICE uint32_t offset_code(float value, Codes codes) {
  return bits_of(value + (0x1.8p23f - codes.min));
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

// The same by a Divisor, with the scale's part still to be multiplied by the scale.
GRACE_HOST_DEVICE Gradient gradient_by(float grad, float weight, const Divisor& by, Codes codes) {
  const float low = codes.min - 1.0f, high = codes.max + 1.0f;  // far enough to round outside
  const float value = by.divide(clamp_between(weight, low * by.scale, high * by.scale));
  const float rounded = rintf(value);
  const float code = clamp_between(rounded, codes.min, codes.max);
  const bool inside = rounded == code;
  return {inside ? grad : 0.0f, grad * (inside ? code - value : code)};
}

}  // namespace grace::fake_quant
