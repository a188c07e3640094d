// dequant_gemm on a CPU with AMX: compiled in every x86-64 Linux build, chosen at run time.
//
// Codes are integers, which bf16 holds exactly, and every x is the sum of one, two or three bf16
// (of bf16, fp16, fp32), so that no product is rounded whatever the dtype. Tile registers sum a
// chunk of K in fp32; its scales come in where it is added to the sum of the output.
//
// Weights are operand A, a band of 16 rows at a time; rows of x are the columns of operand B. A
// step is 32 columns of K, one instruction: those whose codes a vector of words shows after a shift.
// x is brought into that order once a call.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <memory>

#include "ops/dequant_gemm/dequant_gemm_cpu.h"

#define GRACE_SIMD __attribute__((target("avx512f,avx512bw,amx-tile,amx-bf16")))
#define GRACE_SIMD_INLINE GRACE_SIMD inline __attribute__((always_inline))

namespace grace::dequant_gemm::amx {

using Floats = __m512;
using Words = __m512i;
constexpr int kLanes = 16;               // words of a vector; rows and columns of a register
constexpr int kPairs = 16;               // of neighbouring columns of K, in a step
constexpr int kSteps = 2;                // of a tile
constexpr int kBands = kTile / kBand;    // of a tile
constexpr int kOperand = kBand * kPairs;  // words of a register of weights
constexpr int64_t kTilesAtOnce = 2;      // at most, in a chunk: its weights stay in the L1 cache
constexpr int64_t kRowsAtOnce = 256;     // rows of x for which weights are decoded once

// A process has tile registers only after it has asked for them.
inline bool supported() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx512bw") && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (d & kBf16) && (d & kTiles) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// A step then has one scale a row.
inline bool takes(const Problem& p) { return p.group_size % kTile == 0; }

// Vectors in memory, not cleared.
class Scratch {
 public:
  explicit Scratch(int64_t words) : lines_(new Line[(words + kLanes - 1) / kLanes]) {}
  uint32_t* words() { return lines_[0].words; }
  float* floats() { return reinterpret_cast<float*>(lines_.get()); }

 private:
  struct alignas(64) Line {
    uint32_t words[kLanes];
  };
  std::unique_ptr<Line[]> lines_;
};

// --- x as operand B -----------------------------------------------------------------------------

template <typename T>
constexpr int kParts = std::is_same_v<T, bf16> ? 1 : std::is_same_v<T, fp16> ? 2 : 3;

// Rows of x by slabs of up to 16: words [slabs][steps][parts][kPairs][width], pairs of bf16.
struct Slabs {
  int64_t rows;        // that there are; the others are zero
  int log_width;       // a slab is as wide as a register, or just holds the few rows there are
  int64_t slab_words;  // of one slab

  Slabs(int64_t rows, int64_t k_tiles, int parts)
      : rows(rows),
        log_width(std::bit_width(static_cast<uint64_t>(std::min<int64_t>(rows, kLanes) - 1))),
        slab_words(k_tiles * kSteps * parts * kPairs * width()) {}

  int width() const { return 1 << log_width; }
  int64_t count() const { return (rows + width() - 1) / width(); }
};

// Where columns 2 * pair and 2 * pair + 1 of a tile stand in its steps: step * kPairs + pair there.
template <int kBits>
constexpr int place_of(int pair) {
  const int block = pair / 8, c8 = pair / 4 % 2, tig = pair % 4;
  if (kBits == 4) return c8 * kPairs + tig * 4 + block;
  return block / 2 * kPairs + tig * 4 + block % 2 * 2 + c8;
}

// Neighbours of a row of x, in fp32.
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

// What cutting to bf16 leaves over: nothing of NaN and infinity.
GRACE_SIMD_INLINE Floats left_over(Floats x) {
  const Words mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const Floats top = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), mask));
  const Floats size = _mm512_abs_ps(x);
  const auto finite = _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
  return _mm512_maskz_sub_ps(finite, x, top);
}

// The top halves of 32 floats, in order.
GRACE_SIMD_INLINE Words cut(const Neighbours& x) {
  alignas(64) static constexpr std::array<uint16_t, 2 * kLanes> kTops = [] {
    std::array<uint16_t, 2 * kLanes> tops{};
    for (int i = 0; i < 2 * kLanes; ++i) tops[i] = static_cast<uint16_t>(2 * i + 1);
    return tops;
  }();
  return _mm512_permutex2var_epi16(_mm512_castps_si512(x.low), _mm512_load_si512(kTops.data()),
                                   _mm512_castps_si512(x.high));
}

// 32 neighbours of a row in bf16 parts that add up to them.
GRACE_SIMD_INLINE void load_parts(const bf16* x, __mmask32 there, Words* parts) {
  parts[0] = _mm512_maskz_loadu_epi16(there, x);
}

template <typename T>
GRACE_SIMD_INLINE void load_parts(const T* x, __mmask32 there, Words* parts) {
  Neighbours rest = widen(x, there);
  for (int part = 0; part < kParts<T>; ++part) {
    parts[part] = cut(rest);
    rest = {left_over(rest.low), left_over(rest.high)};
  }
}

// One tile's columns of one slab of x. A row of x goes to a column of each step's operand.
template <int kBits, typename T>
GRACE_SIMD void arrange(const T* x, int64_t rows, int64_t k, int64_t tile, const Slabs& slabs,
                        uint32_t* slab) {
  const int width = slabs.width();
  uint32_t* const steps = slab + tile * kSteps * kParts<T> * kPairs * width;
  for (int half = 0; half < 2; ++half) {
    alignas(64) int32_t offsets[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int place = place_of<kBits>(half * kLanes + i);
      offsets[i] = (place / kPairs * kParts<T> * kPairs + place % kPairs) * width;
    }
    const int64_t first = tile * kTile + half * 2 * kLanes;
    const int64_t columns = std::clamp<int64_t>(k - first, 0, 2 * kLanes);
    const auto there = static_cast<__mmask32>((uint64_t{1} << columns) - 1);
    for (int row = 0; row < width; ++row) {
      Words parts[kParts<T>] = {};
      if (row < rows && columns > 0) load_parts(x + row * k + first, there, parts);
      for (int part = 0; part < kParts<T>; ++part)
        _mm512_i32scatter_epi32(steps + part * kPairs * width + row, _mm512_load_si512(offsets),
                                parts[part], sizeof(uint32_t));
    }
  }
}

// --- weights as operand A -----------------------------------------------------------------------

// The codes of one row that a step has, as bf16: `field` says which of those in the words.
template <int kBits>
GRACE_SIMD_INLINE Words codes_of(Words words, int field) {
  if constexpr (kBits == 4) {
    // Looked up, 32 at once. The look-up takes five bits: both halves of the table are the same.
    const Words codes = _mm512_set_epi16(
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -0x4080, -0x4000, -0x3fc0,
        -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000,
        0x3f80, 0, -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00);
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * field), codes);
  } else {
    // Small integers in fp32 end in zeros: their top halves are the same in bf16.
    const Words signed_codes = _mm512_xor_si512(words, _mm512_set1_epi32(0x80808080));
    const Words even = _mm512_srai_epi32(_mm512_slli_epi32(signed_codes, 24 - 8 * field), 24);
    const Words odd = _mm512_srai_epi32(_mm512_slli_epi32(signed_codes, 8 - 8 * field), 24);
    return _mm512_or_si512(
        _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(even)), 16),
        _mm512_castps_si512(_mm512_cvtepi32_ps(odd)));
  }
}

// One band of a tile: operands [kSteps][kBands][16 rows][kPairs], of which this band's are written.
template <int kBits>
GRACE_SIMD_INLINE void decode_band(const uint32_t* words, uint32_t* operands) {
  for (int gid = 0; gid < kBand / 2; ++gid) {
#pragma GCC unroll 2
    for (int strip = 0; strip < kBits / 4; ++strip) {
      const uint32_t* const from = words + strip * 128 + gid * kLanes;
      // May pass the end: a prefetch never faults.
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes);
      const Words stored = _mm512_loadu_si512(from);
#pragma GCC unroll 4
      for (int field = 0; field < 16 / kBits; ++field) {
        const int step = kBits == 4 ? field / 2 : strip, row = gid + field % 2 * 8;
        uint32_t* const operand = operands + step * kBands * kOperand;
        _mm512_store_si512(operand + row * kPairs, codes_of<kBits>(stored, field));
      }
    }
  }
}

// Scales of a band, in fp32.
GRACE_SIMD_INLINE Floats load_scales(const Scales& scales, int64_t group, int64_t row) {
  const int64_t i = group * scales.stride + row;
  if (scales.is_float) return _mm512_loadu_ps(static_cast<const float*>(scales.data) + i);
  const __m256i halves = _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(scales.data) + i));
  if (!scales.is_bf16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// --- products -----------------------------------------------------------------------------------

// Tile registers of one thread: four of sums and three of weights, 16 x 64 bytes; one of x.
class Registers {
 public:
  GRACE_SIMD explicit Registers(int width) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = static_cast<uint16_t>(4 * (i < 5 ? width : kPairs));
      config.rows[i] = kLanes;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  GRACE_SIMD ~Registers() { asm volatile("tilerelease"); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
};

// sums[64 rows of the weight][width] = weights of a chunk times a slab.
GRACE_SIMD inline void multiply(const uint32_t* operands, int64_t steps, int parts,
                                const uint32_t* x, int width, float* sums) {
  constexpr int kRowBytes = 4 * kPairs;
  const int x_bytes = 4 * width;
  asm volatile("" ::: "memory");  // the compiler does not know what tile instructions read
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    for (int part = 0; part < parts; ++part) {
      _tile_loadd(4, x, x_bytes);
      _tile_loadd(5, operands, kRowBytes);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(6, operands + kOperand, kRowBytes);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(7, operands + 2 * kOperand, kRowBytes);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(5, operands + 3 * kOperand, kRowBytes);
      _tile_dpbf16ps(3, 5, 4);
      x += kPairs * width;
    }
    operands += kBands * kOperand;
  }
  _tile_stored(0, sums, x_bytes);
  _tile_stored(1, sums + kBand * width, x_bytes);
  _tile_stored(2, sums + 2 * kBand * width, x_bytes);
  _tile_stored(3, sums + 3 * kBand * width, x_bytes);
}

// sums[64][width] += scales[64] * chunk[64][width]
GRACE_SIMD inline void add_scaled(const Floats* scales, const float* chunk, int log_width,
                                  float* sums) {
  const Words lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Words step = _mm512_set1_epi32(kLanes >> log_width);  // rows of the weight in a vector
  for (int band = 0; band < kBands; ++band) {
    Words row = _mm512_srli_epi32(lane, static_cast<unsigned>(log_width));
    for (int i = 0; i < 1 << log_width; ++i) {
      const Floats scale = _mm512_permutexvar_ps(row, scales[band]);
      const Floats sum = _mm512_fmadd_ps(scale, _mm512_load_ps(chunk), _mm512_load_ps(sums));
      _mm512_store_ps(sums, sum);
      row = _mm512_add_epi32(row, step);
      chunk += kLanes;
      sums += kLanes;
    }
  }
}

// sums[slabs][64][width]: a row of tiles times all of x.
template <int kBits, int kParts>
GRACE_SIMD void multiply_row(const Problem& p, const uint32_t* tiles, const Scales& scales,
                             int64_t first_row, const Slabs& slabs, const uint32_t* x,
                             float* sums) {
  alignas(64) uint32_t operands[kTilesAtOnce * kSteps * kBands * kOperand];
  alignas(64) float chunk[kTile * kLanes];
  const int64_t group_tiles = p.group_size / kTile;
  const int64_t count = group_tiles % kTilesAtOnce == 0 ? kTilesAtOnce : 1;
  for (int64_t tile = 0; tile < p.k_tiles; tile += count) {
    for (int64_t i = 0; i < count; ++i)
      for (int band = 0; band < kBands; ++band)
        decode_band<kBits>(
            tiles + (tile + i) * Layout<kBits>::kTileWords + band * Layout<kBits>::kBandWords,
            operands + (i * kSteps * kBands + band) * kOperand);
    Floats of_band[kBands];
    for (int band = 0; band < kBands; ++band)
      of_band[band] = load_scales(scales, tile / group_tiles, first_row + band * kBand);
    const uint32_t* const steps = x + tile * kSteps * kParts * kPairs * slabs.width();
    for (int64_t slab = 0; slab < slabs.count(); ++slab) {
      multiply(operands, count * kSteps, kParts, steps + slab * slabs.slab_words, slabs.width(),
               chunk);
      add_scaled(of_band, chunk, slabs.log_width, sums + slab * kTile * slabs.width());
    }
  }
}

// --- results ------------------------------------------------------------------------------------

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
  _mm512_mask_cvtepi32_storeu_epi16(to, there,
                                    _mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
}

GRACE_SIMD_INLINE Floats load_bias(const float* bias, __mmask16 there) {
  return widen(bias, there).low;
}

GRACE_SIMD_INLINE Floats load_bias(const fp16* bias, __mmask16 there) {
  return widen(bias, there).low;
}

GRACE_SIMD_INLINE Floats load_bias(const bf16* bias, __mmask16 there) {
  const Words halves = _mm512_maskz_loadu_epi16(there, bias);
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves)), 16));
}

// out[rows][n]: the sums of a row of tiles, the bias, and the one rounding to T.
template <typename T>
GRACE_SIMD void finish(const float* sums, const Slabs& slabs, int64_t first, int64_t n,
                       const T* bias, T* out) {
  const int width = slabs.width();
  const Words lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Words offsets = _mm512_slli_epi32(lane, static_cast<unsigned>(slabs.log_width));
  for (int64_t m = 0; m < slabs.rows; ++m) {
    const float* column = sums + m / width * kTile * width + m % width;
    for (int64_t row = first; row < std::min(first + kTile, n); row += kLanes) {
      const auto there = static_cast<__mmask16>((1u << std::min<int64_t>(n - row, kLanes)) - 1);
      Floats sum = _mm512_i32gather_ps(offsets, column, sizeof(float));
      if (bias != nullptr) sum = _mm512_add_ps(sum, load_bias(bias + row, there));
      store(out + m * n + row, there, sum);
      column += kLanes * width;
    }
  }
}

template <int kBits, typename T>
void run_rows(const Call<T>& call, const T* x, const Slabs& slabs, Scratch& arranged, T* out) {
  const Problem& p = call.problem;
  using torch::stable::parallel_for;
  parallel_for(0, slabs.count() * p.k_tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slab = i / p.k_tiles, row = slab * slabs.width();
      arrange<kBits>(x + row * p.k, slabs.rows - row, p.k, i % p.k_tiles, slabs,
                     arranged.words() + slab * slabs.slab_words);
    }
  });
  parallel_for(0, p.n_tiles, 1, [&](int64_t begin, int64_t end) {
    const Registers registers(slabs.width());
    const int64_t size = slabs.count() * kTile * slabs.width();
    Scratch sums(size);
    for (int64_t tile = begin; tile < end; ++tile) {
      std::fill_n(sums.floats(), size, 0.0f);
      multiply_row<kBits, kParts<T>>(
          p, call.qweight + tile * p.k_tiles * Layout<kBits>::kTileWords, call.scales,
          tile * kTile, slabs, arranged.words(), sums.floats());
      finish(sums.floats(), slabs, tile * kTile, p.n, call.bias, out);
    }
  });
}

template <int kBits, typename T>
void run(const Call<T>& call) {
  const Problem& p = call.problem;
  const Slabs most(std::min(p.m, kRowsAtOnce), p.k_tiles, kParts<T>);
  Scratch arranged(most.count() * most.slab_words);
  for (int64_t m = 0; m < p.m; m += kRowsAtOnce) {
    const Slabs slabs(std::min(p.m - m, kRowsAtOnce), p.k_tiles, kParts<T>);
    run_rows<kBits>(call, call.x + m * p.k, slabs, arranged, call.out + m * p.n);
  }
}

}  // namespace grace::dequant_gemm::amx

#undef GRACE_SIMD_INLINE
#undef GRACE_SIMD
