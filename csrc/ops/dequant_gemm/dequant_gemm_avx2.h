// dequant_gemm on a CPU with AVX2, FMA and F16C: compiled in every x86-64 build, chosen at run
// time.
#pragma once

#include <immintrin.h>

#include "ops/dequant_gemm/dequant_gemm_cpu.h"

#define GRACE_SIMD __attribute__((target("avx2,fma,f16c")))
#define GRACE_SIMD_INLINE GRACE_SIMD inline __attribute__((always_inline))

namespace grace::dequant_gemm::avx2 {

using Floats = __m256;
using Words = __m256i;
constexpr int kLanes = 8;
constexpr int kFewRows =
    4;  // up to here weights go from registers straight into sums: 16 registers
constexpr int kBlockRows = 3;  // rows of x that share a load of dequantized weights

inline bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

GRACE_SIMD_INLINE Floats load(const float* x) { return _mm256_loadu_ps(x); }

GRACE_SIMD_INLINE Floats load(const bf16* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

GRACE_SIMD_INLINE Floats load(const fp16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

GRACE_SIMD_INLINE void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }

GRACE_SIMD_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a, b, c);
}

GRACE_SIMD_INLINE float sum_of(Floats x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Words of codes. Packing added what is a code's top bit in two's complement: taken back here.
template <int kBits>
GRACE_SIMD_INLINE Words load_words(const uint32_t* words) {
  const Words stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  return _mm256_xor_si256(stored, _mm256_set1_epi32(kBits == 4 ? 0x88888888 : 0x80808080));
}

// One field of every word times its scale, rounded once as q * s of the reference is.
template <int kBits>
GRACE_SIMD_INLINE Floats weights_of(Words words, int field, Floats scale) {
  const Words at_top = _mm256_slli_epi32(words, 32 - kBits * (field + 1));
  const Words codes = _mm256_srai_epi32(at_top, 32 - kBits);
  return _mm256_mul_ps(_mm256_cvtepi32_ps(codes), scale);
}

GRACE_SIMD_INLINE Floats spread(float scale) { return _mm256_set1_ps(scale); }

// The scales of a tile's four blocks, each where a run has that block's codes.
template <int kBits>
GRACE_SIMD_INLINE Floats spread_blocks(__m128 of_block, int strip) {
  const Floats all = _mm256_set_m128(of_block, of_block);
  if constexpr (kBits == 4) return all;
  return strip == 0 ? _mm256_unpacklo_ps(all, all) : _mm256_unpackhi_ps(all, all);
}

#include "ops/dequant_gemm/dequant_gemm_simd.h"

}  // namespace grace::dequant_gemm::avx2

#undef GRACE_SIMD_INLINE
#undef GRACE_SIMD
