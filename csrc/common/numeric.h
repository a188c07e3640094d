// Element types of the kernels' tensors, and the conversions to and from the fp32 they compute in.
//
// Plain 16-bit storage types of our own: the same kernel source compiles for the GPU, for a CPU and
// for the emulation, with no torch header and, off the GPU, no CUDA header either.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GRACE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GRACE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace grace {

struct alignas(2) bf16 {
  uint16_t bits;
};

struct alignas(2) fp16 {
  uint16_t bits;
};

GRACE_HOST_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

GRACE_HOST_DEVICE float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

GRACE_HOST_DEVICE float to_float(float x) { return x; }

GRACE_HOST_DEVICE float to_float(bf16 x) { return float_of_bits(uint32_t{x.bits} << 16); }

GRACE_HOST_DEVICE float to_float(fp16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127 and normalizes subnormals.
  const float scaled = float_of_bits(magnitude << 13) * float_of_bits(0x77800000u);
  return float_of_bits(sign | bits_of(scaled));
#endif
}

// Rounds to nearest, ties to even, like torch's casts.
template <typename T>
GRACE_HOST_DEVICE T from_float(float x);

template <>
GRACE_HOST_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
GRACE_HOST_DEVICE bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__)
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fc0u};  // NaN stays NaN
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
GRACE_HOST_DEVICE fp16 from_float<fp16>(float x) {
#if defined(__CUDA_ARCH__)
  return fp16{__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bits_of(x);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return fp16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return fp16{static_cast<uint16_t>(sign | 0x7c00u)};  // to infinity
  if (magnitude < 0x38800000u) {  // subnormal in fp16: let an fp32 addition do the rounding
    const float shifted = float_of_bits(magnitude) + float_of_bits(0x3f000000u);
    return fp16{static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return fp16{static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

// Two at once, as one register: the first in the low half.
template <typename T>
GRACE_HOST_DEVICE uint32_t pair_from_floats(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
#endif
}

// The nearest value of the grid of T, as fp32.
template <typename T>
GRACE_HOST_DEVICE float round_through(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace grace
