// dequant_gemm on a CPU with AMX: compiled in every x86-64 Linux build, chosen at run time.
//
// Products are exact (dequant_gemm_bf16.h). Tile registers sum a chunk of K in fp32; its scales
// come in where it is added to the sum of the output.
//
// Weights are operand A, a band of 16 rows at a time; rows of x are the columns of operand B. A
// step is 32 columns of K, one instruction: those whose codes a vector of words shows after a
// shift. x is brought into that order once a call.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>

#include "ops/dequant_gemm/dequant_gemm_bf16.h"

#define GRACE_SIMD __attribute__((target("avx512f,avx512bw,amx-tile,amx-bf16")))
#define GRACE_SIMD_INLINE GRACE_SIMD inline __attribute__((always_inline))

namespace grace::dequant_gemm::amx {

using namespace in_bf16;

static_assert(kLanes == 16);  // also rows and columns of a register
constexpr int kPairs = 16;    // of neighbouring columns of K, in a step
constexpr int kStepsOfTile = 2;
constexpr int kOperand = kBand * kPairs;  // words of a register of weights
constexpr int64_t kRowsAtOnce = 128;      // rows of x for which weights are decoded once

// A process has tile registers only after it has asked for them.
inline bool supported() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx512bw") && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (d & kBf16) && (d & kTiles) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Columns for rows, of 16 x 16 words.
GRACE_SIMD_INLINE void transpose(Words* rows) {
  Words pairs[kLanes], fours[kLanes];  // of rows: 64 bits, then 128 bits from one column
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // column 4 * quarter + i is quarter `quarter` of four vectors
    const Words first = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x44);
    const Words second = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xee);
    const Words third = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x44);
    const Words fourth = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xee);
    rows[i] = _mm512_shuffle_i32x4(first, third, 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(first, third, 0xdd);
    rows[i + 8] = _mm512_shuffle_i32x4(second, fourth, 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(second, fourth, 0xdd);
  }
}

// --- x as operand B -----------------------------------------------------------------------------

// How a call is cut, all that a kernel is compiled for. Rows of x go by slabs of kWidth, columns by
// chunks of kTiles. A chunk of a slab is operands, in words [kSteps][kParts][kPairs][kWidth].
template <int kBits_, typename T_, int kWidth_, int kTiles_>
struct Cut {
  using T = T_;
  static constexpr int kBits = kBits_, kWidth = kWidth_, kTiles = kTiles_;
  static constexpr int kParts = kPartsOf<T>;
  static constexpr int kSteps = kTiles * kStepsOfTile;
  static constexpr int kChunk = kSteps * kParts * kPairs * kWidth;  // words, of a slab
  static constexpr int kSums = kTile * kWidth;                      // of a slab
};

// Where columns 2 * pair and 2 * pair + 1 of a tile stand in its steps: step * kPairs + pair there.
template <int kBits>
constexpr int place_of(int pair) {
  const int block = pair / 8, c8 = pair / 4 % 2, tig = pair % 4;
  if (kBits == 4) return c8 * kPairs + tig * 4 + block;
  return block / 2 * kPairs + tig * 4 + block % 2 * 2 + c8;
}

// A chunk of one slab: rows of x become columns of every step's operand.
template <typename Cut>
GRACE_SIMD void arrange(const typename Cut::T* x, int64_t rows, int64_t columns, int64_t stride,
                        uint32_t* chunk) {
  constexpr int kPart = kPairs * Cut::kWidth, kHalf = 2 * kLanes, kAhead = 4 * kHalf;
  constexpr auto kWide = static_cast<__mmask16>((1u << Cut::kWidth) - 1);
  for (int half = 0; half < 2 * Cut::kTiles; ++half) {
    const int64_t count = std::clamp<int64_t>(columns - half * kHalf, 0, kHalf);
    const auto there = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    const auto* const from = x + (count > 0 ? half * kHalf : 0);
    uint32_t* const tile = chunk + half / 2 * kStepsOfTile * Cut::kParts * kPart;
    for (int part = 0; part < Cut::kParts; ++part) {
      Words pairs[kLanes] = {};
      for (int row = 0; row < Cut::kWidth && row < rows; ++row) {
        __builtin_prefetch(from + row * stride + kAhead);  // may pass the end
        Neighbours rest = widen(from + row * stride, there);
        for (int i = 0; i < part; ++i) rest = {left_over(rest.low), left_over(rest.high)};
        pairs[row] = top_halves(rest);
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int place = place_of<Cut::kBits>(half % 2 * kLanes + i), step = place / kPairs;
        uint32_t* const operand = tile + (step * Cut::kParts + part) * kPart;
        _mm512_mask_storeu_epi32(operand + place % kPairs * Cut::kWidth, kWide, pairs[i]);
      }
    }
  }
}

// --- weights as operand A -----------------------------------------------------------------------

using Decoded = uint32_t[kStepsOfTile][kBands * kOperand];  // a tile: operands of four bands

// One band of a tile, to where it stands in the first step.
template <int kBits>
GRACE_SIMD_INLINE void decode_band(const uint32_t* words, uint32_t* operands) {
  for (int gid = 0; gid < kBand / 2; ++gid) {
#pragma GCC unroll 2
    for (int strip = 0; strip < kBits / 4; ++strip) {
      const uint32_t* const from = words + strip * 128 + gid * kLanes;
      const Words stored = _mm512_loadu_si512(from);
#pragma GCC unroll 4
      for (int field = 0; field < 16 / kBits; ++field) {
        const int step = kBits == 4 ? field / 2 : strip, row = gid + field % 2 * 8;
        uint32_t* const operand = operands + step * kBands * kOperand;
        _mm512_store_si512(operand + row * kPairs,
                           codes_of<kBits>(_mm512_srli_epi32(stored, kBits * field)));
      }
    }
  }
}

// --- products -----------------------------------------------------------------------------------

// Tile registers of one thread: five of sums and x, 16 x width words; three of weights, 16 x 16.
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

// products[64 rows of the weight][kWidth] = weights of a chunk times that chunk of a slab. Tile
// registers work beside the vector units, but only as far as a core looks ahead: `meanwhile(step)`
// is called after each step for work on vectors.
template <typename Cut, typename F>
GRACE_SIMD_INLINE void multiply(const Decoded* slots, int first, const uint32_t* x, float* products,
                                const F& meanwhile) {
  constexpr int kRowBytes = 4 * kPairs, kBytes = 4 * Cut::kWidth, kPart = kPairs * Cut::kWidth;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#pragma GCC unroll 4
  for (int step = 0; step < Cut::kSteps; ++step) {
    asm volatile("" ::: "memory");  // the compiler does not know what tile instructions read
    const uint32_t* const operands = slots[(first + step / kStepsOfTile) % 2][step % kStepsOfTile];
#pragma GCC unroll 3
    for (int part = 0; part < Cut::kParts; ++part) {
      _tile_loadd(4, x, kBytes);
      _tile_loadd(5, operands, kRowBytes);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(6, operands + kOperand, kRowBytes);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(7, operands + 2 * kOperand, kRowBytes);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(5, operands + 3 * kOperand, kRowBytes);
      _tile_dpbf16ps(3, 5, 4);
      x += kPart;
    }
    meanwhile(step);
  }
  _tile_stored(0, products, kBytes);
  _tile_stored(1, products + kPart, kBytes);
  _tile_stored(2, products + 2 * kPart, kBytes);
  _tile_stored(3, products + 3 * kPart, kBytes);
}

// Products of a chunk that are still to be scaled and added: sums[64][kWidth] += scales[64] * them.
struct Pending {
  const Floats* scales;  // of the four bands
  const float* products;
  float* sums;
};

template <int kWidth>
GRACE_SIMD_INLINE void add_band(const Pending& pending, int band) {
  const Words lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  constexpr int kRows = kLanes / kWidth;  // of the weight, in a vector
  Words row = _mm512_srli_epi32(lane, std::countr_zero(static_cast<unsigned>(kWidth)));
  float* const sums = pending.sums + band * kLanes * kWidth;
  const float* const products = pending.products + band * kLanes * kWidth;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    const Floats scale = _mm512_permutexvar_ps(row, pending.scales[band]);
    const Floats product = _mm512_load_ps(products + i * kLanes);
    const Floats sum = _mm512_load_ps(sums + i * kLanes);
    _mm512_store_ps(sums + i * kLanes, _mm512_fmadd_ps(scale, product, sum));
    row = _mm512_add_epi32(row, _mm512_set1_epi32(kRows));
  }
}

// The part of it that goes with a step of the next multiplication.
template <typename Cut>
GRACE_SIMD_INLINE void add(const Pending& pending, int step) {
  constexpr int kCount = kBands / Cut::kSteps;
  if (pending.sums == nullptr) return;
  for (int i = 0; i < kCount; ++i) add_band<Cut::kWidth>(pending, step * kCount + i);
}

// Decodes tiles in the order in which they lie, half a tile at a time.
template <int kBits>
class Decoder {
 public:
  Decoder(const uint32_t* begin, const uint32_t* end) : next_(begin), end_(end) {}

  GRACE_SIMD_INLINE void decode(int half, Decoded* slot) {
    if (next_ == end_) return;
    for (int band = half * kBands / 2; band < (half + 1) * kBands / 2; ++band)
      decode_band<kBits>(next_ + band * Layout<kBits>::kBandWords, (*slot)[0] + band * kOperand);
    if (half == 1) next_ += Layout<kBits>::kTileWords;
  }

  const uint32_t* next() const { return next_; }

 private:
  const uint32_t* next_;
  const uint32_t* end_;
};

// Rows of tiles [begin, end) times all slabs; `finish(row)` is called once sums[slabs][64][kWidth]
// of a row are there. All at once, a chunk is multiplied, the products before are scaled and added,
// the next tile is decoded, and the weights after it are fetched.
template <typename Cut, typename F>
GRACE_SIMD void multiply_rows(const Problem& p, const uint32_t* qweight, const Scales& scales,
                              int64_t begin, int64_t end, int64_t slabs, const uint32_t* x,
                              float* sums, const F& finish) {
  constexpr int kTileWords = Layout<Cut::kBits>::kTileWords;
  constexpr int64_t kLines = Cut::kTiles * kTileWords / kLanes;  // of memory, in a chunk
  alignas(64) Decoded slots[2];
  alignas(64) float products[2][Cut::kSums];
  Floats of_bands[2][kBands];
  const int64_t chunks = p.k_tiles / Cut::kTiles;
  const int64_t chunks_of_group = p.group_size / (Cut::kTiles * kTile);
  const int64_t lines_of_step = (kLines + slabs * Cut::kSteps - 1) / (slabs * Cut::kSteps);
  Decoder<Cut::kBits> decoder(qweight + begin * p.k_tiles * kTileWords,
                              qweight + end * p.k_tiles * kTileWords);
  Pending pending{};
  int first = 0, side = 0;  // slot of a chunk's first tile; products that are written
  for (int half = 0; half < 2; ++half) decoder.decode(half, slots);
  for (int64_t row = begin; row < end; ++row) {
    std::fill_n(sums, slabs * Cut::kSums, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      Floats* const of_chunk = of_bands[chunk % 2];
      for (int band = 0; band < kBands; ++band)
        of_chunk[band] = load_scales(scales, chunk / chunks_of_group, row * kTile + band * kBand);
      const uint32_t* fetched = decoder.next() + Cut::kTiles * kTileWords;
      for (int64_t slab = 0; slab < slabs; ++slab) {
        const uint32_t* const chunk_of_x = x + (chunk * slabs + slab) * Cut::kChunk;
        multiply<Cut>(slots, first, chunk_of_x, products[side], [&](int step) GRACE_SIMD {
          add<Cut>(pending, step);
          // May pass the end: a prefetch never faults.
          for (int64_t line = 0; line < lines_of_step; ++line, fetched += kLanes)
            __builtin_prefetch(fetched);
          // A tile of this chunk is there before the other slabs need it; one of the next chunk
          // takes the place of a tile that all slabs have used.
          const int tile = step / kStepsOfTile + 1;
          if (tile < Cut::kTiles ? slab == 0 : slab + 1 == slabs)
            decoder.decode(step % kStepsOfTile, slots + (first + tile) % 2);
        });
        pending = {of_chunk, products[side], sums + slab * Cut::kSums};
        side = 1 - side;
      }
      first = (first + Cut::kTiles) % 2;
    }
    for (int step = 0; step < Cut::kSteps; ++step) add<Cut>(pending, step);
    pending = {};
    finish(row);
  }
}

// --- results ------------------------------------------------------------------------------------

// out[rows][n]: the sums of a row of tiles, the bias, and the one rounding to T.
template <int kWidth, typename T>
GRACE_SIMD void finish(const float* sums, int64_t rows, int64_t first, int64_t n, const T* bias,
                       T* out) {
  constexpr auto kWide = static_cast<__mmask16>((1u << kWidth) - 1);
  for (int64_t m = 0; m < rows; m += kWidth) {
    for (int64_t row = first; row < std::min(first + kTile, n); row += kLanes) {
      const auto there = static_cast<__mmask16>((1u << std::min<int64_t>(n - row, kLanes)) - 1);
      const float* const band = sums + m * kTile + (row - first) * kWidth;
      Words columns[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        columns[i] = _mm512_maskz_loadu_epi32(kWide, band + i * kWidth);
      transpose(columns);
      const Floats added = bias ? widen(bias + row, there).low : _mm512_setzero_ps();
      for (int i = 0; i < kWidth && m + i < rows; ++i) {
        const Floats sum = _mm512_add_ps(_mm512_castsi512_ps(columns[i]), added);
        store(out + (m + i) * n + row, there, sum);
      }
    }
  }
}

// Up to kRowsAtOnce rows of x.
template <typename Cut, typename T = Cut::T>
void run_rows(const Call<T>& call, const T* x, int64_t rows, uint32_t* arranged, T* out) {
  using torch::stable::parallel_for;
  const Problem& p = call.problem;
  const int64_t slabs = (rows + Cut::kWidth - 1) / Cut::kWidth, chunks = p.k_tiles / Cut::kTiles;
  parallel_for(0, slabs * chunks, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % slabs * Cut::kWidth, column = i / slabs * Cut::kTiles * kTile;
      arrange<Cut>(x + row * p.k + column, rows - row, p.k - column, p.k,
                   arranged + i * Cut::kChunk);
    }
  });
  parallel_for(0, p.n_tiles, 1, [&](int64_t begin, int64_t end) {
    const Registers registers(Cut::kWidth);
    Scratch sums(slabs * Cut::kSums);
    multiply_rows<Cut>(p, call.qweight, call.scales, begin, end, slabs, arranged, sums.floats(),
                       [&](int64_t tile) {
                         finish<Cut::kWidth>(sums.floats(), rows, tile * kTile, p.n, call.bias,
                                             out);
                       });
  });
}

template <typename Cut, typename T = Cut::T>
void run_cut(const Call<T>& call) {
  const Problem& p = call.problem;
  const int64_t slabs = (std::min(p.m, kRowsAtOnce) + Cut::kWidth - 1) / Cut::kWidth;
  Scratch& arranged = kept_scratch();
  arranged.reserve(slabs * (p.k_tiles / Cut::kTiles) * Cut::kChunk);
  for (int64_t m = 0; m < p.m; m += kRowsAtOnce)
    run_rows<Cut>(call, call.x + m * p.k, std::min(p.m - m, kRowsAtOnce), arranged.words(),
                  call.out + m * p.n);
}

template <int kBits, typename T>
void run(const Call<T>& call) {
  constexpr int kFew = 4;  // less to add: then memory alone should set the pace
  const bool few = call.problem.m <= kFew, pairs = call.problem.group_size / kTile % 2 == 0;
  if (few && pairs) return run_cut<Cut<kBits, T, kFew, 2>>(call);
  if (few) return run_cut<Cut<kBits, T, kFew, 1>>(call);
  if (pairs) return run_cut<Cut<kBits, T, kLanes, 2>>(call);
  run_cut<Cut<kBits, T, kLanes, 1>>(call);
}

}  // namespace grace::dequant_gemm::amx

#undef GRACE_SIMD_INLINE
#undef GRACE_SIMD
