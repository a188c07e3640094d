// dequant_gemm on a CPU with AVX-512F: compiled in every x86-64 build, chosen at run time.
#pragma once

#include <immintrin.h>

#include "ops/dequant_gemm/dequant_gemm_cpu.h"

#define GRACE_SIMD __attribute__((target("avx512f")))
#define GRACE_SIMD_INLINE GRACE_SIMD inline __attribute__((always_inline))

namespace grace::dequant_gemm::avx512 {

using Floats = __m512;
using Words = __m512i;
constexpr int kLanes = 16;
constexpr int kFewRows =
    8;  // up to here weights go from registers straight into sums: 32 registers
constexpr int kBlockRows = 6;  // rows of x that share a load of dequantized weights

inline bool supported() { return __builtin_cpu_supports("avx512f"); }

GRACE_SIMD_INLINE Floats load(const float* x) { return _mm512_loadu_ps(x); }

GRACE_SIMD_INLINE Floats load(const bf16* x) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

GRACE_SIMD_INLINE Floats load(const fp16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

GRACE_SIMD_INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }

GRACE_SIMD_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}

GRACE_SIMD_INLINE float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }

template <int kBits>
GRACE_SIMD_INLINE Words load_words(const uint32_t* words) {
  return _mm512_loadu_si512(words);
}

// One field of every word times its scale, rounded once as q * s of the reference is. 4-bit codes
// are looked up, 16 at once; the look-up ignores the bits above a field.
template <int kBits>
GRACE_SIMD_INLINE Floats weights_of(Words words, int field, Floats scale) {
  if constexpr (kBits == 4) {
    const Floats codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const Words index = _mm512_srli_epi32(words, 4 * field);
    return _mm512_mul_ps(_mm512_permutexvar_ps(index, codes), scale);
  } else {
    const Words offset =
        _mm512_and_si512(_mm512_srli_epi32(words, 8 * field), _mm512_set1_epi32(255));
    const Words codes = _mm512_sub_epi32(offset, _mm512_set1_epi32(128));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(codes), scale);
  }
}

GRACE_SIMD_INLINE Floats spread(float scale) { return _mm512_set1_ps(scale); }

// The scales of a tile's four blocks, each where a run has that block's codes.
template <int kBits>
GRACE_SIMD_INLINE Floats spread_blocks(__m128 of_block, int strip) {
  const Floats all = _mm512_broadcast_f32x4(of_block);
  if constexpr (kBits == 4) return all;
  return strip == 0 ? _mm512_unpacklo_ps(all, all) : _mm512_unpackhi_ps(all, all);
}

#include "ops/dequant_gemm/dequant_gemm_simd.h"

}  // namespace grace::dequant_gemm::avx512

#undef GRACE_SIMD_INLINE
#undef GRACE_SIMD
