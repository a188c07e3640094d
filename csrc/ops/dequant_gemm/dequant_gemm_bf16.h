// What the kernels of dequant_gemm that multiply in bf16 share: dequant_gemm_amx.h and
// dequant_gemm_avx512bf16.h. Codes are integers, which bf16 holds exactly, and every x is the sum
// of one, two or three bf16 (of bf16, fp16, fp32), so that no product is rounded whatever the
// dtype.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <memory>

#include "ops/dequant_gemm/dequant_gemm_cpu.h"

#define GRACE_SIMD __attribute__((target("avx512f,avx512bw")))
#define GRACE_SIMD_INLINE GRACE_SIMD inline __attribute__((always_inline))

namespace grace::dequant_gemm::in_bf16 {

using Floats = __m512;
using Words = __m512i;
constexpr int kLanes = 16;             // words of a vector
constexpr int kBands = kTile / kBand;  // of a tile

// A chunk of K then has one scale a row.
inline bool takes(const Problem& p) { return p.group_size % kTile == 0; }

// Vectors in memory, not cleared.
class Scratch {
 public:
  explicit Scratch(int64_t words = 0) { reserve(words); }
  void reserve(int64_t words) {
    const int64_t lines = (words + kLanes - 1) / kLanes;
    if (lines > size_) lines_.reset(new Line[lines]), size_ = lines;
  }
  uint32_t* words() { return lines_[0].words; }
  float* floats() { return reinterpret_cast<float*>(words()); }

 private:
  struct alignas(64) Line {
    uint32_t words[kLanes];
  };
  std::unique_ptr<Line[]> lines_;
  int64_t size_ = 0;
};

// Where x is as the kernel takes it. Kept: it is megabytes, whose pages would be new at each call.
inline Scratch& kept_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// --- x as parts ----------------------------------------------------------------------------------

// Of every x, as a sum of bf16 without rounding.
template <typename T>
constexpr int kPartsOf = std::is_same_v<T, bf16>   ? 1
                         : std::is_same_v<T, fp16> ? 2
                                                   : 3;

// 32 neighbours of a row of x, in fp32.
struct Neighbours {
  Floats low, high;
};

GRACE_SIMD_INLINE Neighbours widen(const float* x, __mmask32 there) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(there), x),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> kLanes), x + kLanes)};
}

GRACE_SIMD_INLINE Neighbours widen(const fp16* x, __mmask32 there) {
  const Words halves = _mm512_maskz_loadu_epi16(there, x);
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}

GRACE_SIMD_INLINE Neighbours widen(const bf16* x, __mmask32 there) {
  const Words halves = _mm512_maskz_loadu_epi16(there, x);
  const Words low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
  const Words high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)),
          _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))};
}

// What cutting to bf16 leaves over: nothing of NaN and infinity.
GRACE_SIMD_INLINE Floats left_over(Floats x) {
  const Words mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const Floats top = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), mask));
  const Floats infinity = _mm512_set1_ps(INFINITY);
  const auto finite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), infinity, _CMP_LT_OQ);
  return _mm512_maskz_sub_ps(finite, x, top);
}

// The top halves of 32 floats, in order.
GRACE_SIMD_INLINE Words top_halves(const Neighbours& x) {
  alignas(64) static constexpr std::array<uint16_t, 2 * kLanes> kTops = [] {
    std::array<uint16_t, 2 * kLanes> tops{};
    for (int i = 0; i < 2 * kLanes; ++i) tops[i] = static_cast<uint16_t>(2 * i + 1);
    return tops;
  }();
  return _mm512_permutex2var_epi16(_mm512_castps_si512(x.low), _mm512_load_si512(kTops.data()),
                                   _mm512_castps_si512(x.high));
}

// --- codes of weights ---------------------------------------------------------------------------

// 7 to -8, looked up 32 at once. The look-up takes five bits: both halves of the table are the
// same.
GRACE_SIMD_INLINE Words look_up(Words nibbles) {
  const Words codes = _mm512_set_epi16(
      0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -0x4080, -0x4000, -0x3fc0, -0x3f80,
      -0x3f60, -0x3f40, -0x3f20, -0x3f00, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0,
      -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00);
  return _mm512_permutexvar_epi16(nibbles, codes);
}

// Bytes 0 and 2 of every word, less 128, as bf16: small integers in fp32 end in zeros.
GRACE_SIMD_INLINE Words convert_bytes(Words words) {
  const Words byte = _mm512_set1_epi32(255), magic = _mm512_set1_epi32(0x4b000000);  // 2^23
  const Floats offset = _mm512_set1_ps(0x1p23f + 128);
  const auto code = [&](Words bytes) GRACE_SIMD {
    const Words sum = _mm512_ternarylogic_epi32(bytes, byte, magic, 0xea);  // a & b | c
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(sum), offset));
  };
  const Words low = code(words), high = code(_mm512_srli_epi32(words, 16));
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
}

// The codes in the low bits of every half of a word, whatever is above them.
template <int kBits>
GRACE_SIMD_INLINE Words codes_of(Words halves) {
  return kBits == 4 ? look_up(halves) : convert_bytes(halves);
}

// --- scales and results --------------------------------------------------------------------------

// Scales of a band, in fp32.
GRACE_SIMD_INLINE Floats load_scales(const Scales& scales, int64_t group, int64_t row) {
  const int64_t i = group * scales.stride + row;
  if (scales.is_float) return _mm512_loadu_ps(static_cast<const float*>(scales.data) + i);
  constexpr __mmask32 kSixteen = 0xffff;
  if (scales.is_bf16) return widen(static_cast<const bf16*>(scales.data) + i, kSixteen).low;
  return widen(static_cast<const fp16*>(scales.data) + i, kSixteen).low;
}

// The scales of a tile lie far from those of other groups: nothing else would fetch them in time.
inline void prefetch_scales(const Scales& scales, int64_t group, int64_t row) {
  const int64_t bytes = scales.is_float ? 4 : 2;
  const auto* const first =
      static_cast<const char*>(scales.data) + (group * scales.stride + row) * bytes;
  for (int64_t line = 0; line < kTile * bytes; line += 64) __builtin_prefetch(first + line);
}

GRACE_SIMD_INLINE void store(float* to, __mmask16 there, Floats x) {
  _mm512_mask_storeu_ps(to, there, x);
}

GRACE_SIMD_INLINE void store(fp16* to, __mmask16 there, Floats x) {
  const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm512_mask_storeu_epi16(to, there, _mm512_castsi256_si512(halves));
}

// As from_float<bf16>: the instruction for it would lose subnormal numbers.
GRACE_SIMD_INLINE void store(bf16* to, __mmask16 there, Floats x) {
  const Words bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const Words half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const Words rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const auto nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm512_mask_cvtepi32_storeu_epi16(to, there, _mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
}

}  // namespace grace::dequant_gemm::in_bf16

#undef GRACE_SIMD_INLINE
#undef GRACE_SIMD
