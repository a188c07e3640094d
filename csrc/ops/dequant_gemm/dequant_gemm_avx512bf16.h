// dequant_gemm on a CPU with AVX512_BF16: compiled in every x86-64 build, chosen at run time.
//
// A vector holds two neighbouring columns of 16 rows of the weight, as bf16, and is multiplied by
// those two columns of a row of x, broadcast from memory: one instruction makes 32 exact products
// (dequant_gemm_bf16.h) and adds them to the sums of 16 outputs. Sums of a chunk of K stay in
// registers, integers times x; its scales come in where they are added to the sums of the outputs.
//
// What a word of the packed layout holds makes that vector after a transposition of words:
//
//   a band, 64 columns at 4 bits          [word][gid]                 a step: columns 2i and 2i + 1
//   gid 0: words 0 .. 15          word 0: gid 0 .. 7                  gid 0 .. 7, gid 0 .. 7
//   ...                     ->    ...                           ->    shifted to   shifted to
//   gid 7: words 0 .. 15          word 15: gid 0 .. 7                 row gid,     row gid + 8
//
// and a look-up, so that nothing is turned round at the end: 16 lanes are 16 neighbours in memory
// of the scales, the bias and the output.
#pragma once

#include "ops/dequant_gemm/dequant_gemm_bf16.h"

#define GRACE_SIMD __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define GRACE_SIMD_INLINE GRACE_SIMD inline __attribute__((always_inline))

namespace grace::dequant_gemm::avx512bf16 {

using namespace in_bf16;

constexpr int kGids = 8;
constexpr int kSteps = kTile / 2;     // of a tile: pairs of neighbouring columns
constexpr int kStepsAtOnce = 8;       // the part of them that is unrolled
constexpr int kBlockRows = 6;         // rows of x, times four bands: 24 registers of sums
constexpr int64_t kRowsAtOnce = 256;  // rows of x for which weights are decoded once
constexpr int kVectorsOfTile = kSteps * kBands;

inline bool supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}

// How a call is cut, all that a kernel is compiled for: columns go by chunks of kTiles.
template <int kBits_, typename T_, int kTiles_>
struct Cut {
  using T = T_;
  static constexpr int kBits = kBits_, kTiles = kTiles_;
  static constexpr int kParts = kPartsOf<T>;
  static constexpr int kRow = kTiles * kParts * kSteps;               // words of a row of x
  static constexpr int kPacked = kTiles * Layout<kBits>::kTileWords;  // words of the weight
  static constexpr int kDecoded = kTiles * kVectorsOfTile * kLanes;   // the same as bf16
};

// --- x ------------------------------------------------------------------------------------------

// A chunk of one row as pairs of bf16, [kTiles][kParts][kSteps], zeros beyond `columns`.
template <typename Cut>
GRACE_SIMD void arrange(const typename Cut::T* x, int64_t columns, uint32_t* to) {
  constexpr int kHalf = 2 * kLanes;
  for (int half = 0; half < 2 * Cut::kTiles; ++half) {
    const int64_t count = std::clamp<int64_t>(columns - half * kHalf, 0, kHalf);
    const auto there = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    Neighbours rest = widen(x + (count > 0 ? half * kHalf : 0), there);
    for (int part = 0; part < Cut::kParts; ++part) {
      uint32_t* const pairs = to + (half / 2 * Cut::kParts + part) * kSteps + half % 2 * kLanes;
      _mm512_storeu_si512(pairs, top_halves(rest));
      rest = {left_over(rest.low), left_over(rest.high)};
    }
  }
}

// --- weights ------------------------------------------------------------------------------------

// Eight vectors [gid][word] as words [word][gid], in the order of columns.
GRACE_SIMD_INLINE void transpose(const uint32_t* from, uint32_t* to) {
  const Words first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const Words second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  Words pairs[kGids], fours[kGids];  // of gids: 64 bits, then 128 bits of one word
#pragma GCC unroll 4
  for (int i = 0; i < kGids; i += 2) {
    const Words even = _mm512_loadu_si512(from + i * kLanes);
    const Words odd = _mm512_loadu_si512(from + (i + 1) * kLanes);
    pairs[i] = _mm512_unpacklo_epi32(even, odd);
    pairs[i + 1] = _mm512_unpackhi_epi32(even, odd);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kGids; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // word i of every tig, then the next
    uint32_t* const words = to + i * 2 * kLanes;
    _mm512_store_si512(words, _mm512_permutex2var_epi64(fours[i], first, fours[i + 4]));
    _mm512_store_si512(words + kLanes, _mm512_permutex2var_epi64(fours[i], second, fours[i + 4]));
  }
}

// The chunks of one thread, in the order in which they lie. While one is used, the next is
// transposed and those after it are fetched, a little with every few steps.
template <typename Cut>
class Chunks {
 public:
  GRACE_SIMD Chunks(const uint32_t* begin, const uint32_t* end) : next_(begin), end_(end) {
    for (int part = 0; part < kParts; ++part) prepare(part);
    turn();
  }

  // The transposed words of the chunk at hand.
  const uint32_t* words() const { return words_[side_]; }

  // One part of kParts of the work for the next chunk.
  GRACE_SIMD_INLINE void prepare(int part) {
    constexpr int kStrip = kGids * kLanes, kStrips = Cut::kPacked / kStrip / kParts;
    if (next_ == end_) return;
#pragma GCC unroll 2
    for (int i = part * kStrips; i < (part + 1) * kStrips; ++i) {
      // May pass the end: a prefetch never faults.
      for (int line = 0; line < kStrip; line += kLanes)
        __builtin_prefetch(next_ + i * kStrip + line + kAhead, 0, 2);  // into the L2 cache
      transpose(next_ + i * kStrip, words_[1 - side_] + i * kStrip);
    }
  }

  // To the next chunk, all of which has been prepared.
  void turn() {
    if (next_ != end_) next_ += Cut::kPacked;
    side_ = 1 - side_;
  }

 private:
  static constexpr int kParts = Cut::kTiles * kSteps / kStepsAtOnce;
  static constexpr int kAhead = kPrefetchBytes / sizeof(uint32_t);
  alignas(64) uint32_t words_[2][Cut::kPacked];
  int side_ = 0;
  const uint32_t* next_;
  const uint32_t* end_;
};

// Where weights come from, as bf16: the packed codes of a chunk, when they are used first ...
template <typename Cut>
struct Packed {
  const uint32_t* words;
  Chunks<Cut>* chunks;

  // The columns of a tile that a step has, in pairs.
  static constexpr int column(int step) {
    return Cut::kBits == 4 ? step / 8 * 8 + step % 2 * 4 + step % 8 / 2 : step;
  }

  // Called once for every kStepsAtOnce steps.
  GRACE_SIMD_INLINE void meanwhile(int tile, int first) const {
    chunks->prepare((tile * kSteps + first) / kStepsAtOnce);
  }

  GRACE_SIMD_INLINE Words operator()(int tile, int band, int first, int i) const {
    constexpr int kFields = 8 / Cut::kBits;  // pairs of a row, in a word
    const uint32_t* const of_band = words + tile * Layout<Cut::kBits>::kTileWords +
                                    band * Layout<Cut::kBits>::kBandWords + first / kFields * kGids;
    const auto* const eight = reinterpret_cast<const __m256i*>(of_band + i / kFields * kGids);
    const Words both = _mm512_broadcast_i64x4(_mm256_load_si256(eight));
    const int low = i % kFields * 8, high = low + Cut::kBits;
    const Words shifts = _mm512_inserti64x4(_mm512_set1_epi32(low), _mm256_set1_epi32(high), 1);
    const Words fields = _mm512_srlv_epi32(both, shifts);
    return codes_of<Cut::kBits>(fields);
  }
};

// ... or what was decoded from them, [kTiles][kSteps][kBands] vectors.
template <typename Cut>
struct Decoded {
  const uint32_t* vectors;

  GRACE_SIMD_INLINE void meanwhile(int, int) const {}

  GRACE_SIMD_INLINE Words operator()(int tile, int band, int first, int i) const {
    const uint32_t* const of_steps = vectors + (tile * kSteps + first) * kBands * kLanes;
    return _mm512_load_si512(of_steps + (i * kBands + band) * kLanes);
  }
};

template <typename Cut>
GRACE_SIMD void decode(const Packed<Cut>& packed, uint32_t* vectors) {
  for (int tile = 0; tile < Cut::kTiles; ++tile) {
    for (int first = 0; first < kSteps; first += kStepsAtOnce) {
      packed.meanwhile(tile, first);
#pragma GCC unroll 8
      for (int i = 0; i < kStepsAtOnce; ++i) {
#pragma GCC unroll 4
        for (int band = 0; band < kBands; ++band, vectors += kLanes)
          _mm512_store_si512(vectors, packed(tile, band, first, i));
      }
    }
  }
}

// --- products -----------------------------------------------------------------------------------

// sum += both columns of 16 rows times those of x. As an instruction: compilers load x apart, and
// then lack registers.
GRACE_SIMD_INLINE void multiply_add(Floats& sum, Words weights, const uint32_t* x) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*x));
}

// sums[kM][64] += scales * (weights of a chunk times kM rows of it), in one order for any kM.
template <typename Cut, typename Weights, int kM>
GRACE_SIMD void add(const Weights& weights, const Floats* scales, const uint32_t* x, float* sums) {
  Floats products[kM][kBands];
#pragma GCC unroll 6
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int band = 0; band < kBands; ++band) products[m][band] = _mm512_setzero_ps();
  for (int tile = 0; tile < Cut::kTiles; ++tile) {
    const uint32_t* const x_of_tile = x + tile * Cut::kParts * kSteps;
    for (int first = 0; first < kSteps; first += kStepsAtOnce) {
      weights.meanwhile(tile, first);
#pragma GCC unroll 8
      for (int i = 0; i < kStepsAtOnce; ++i) {
        const uint32_t* const pairs = x_of_tile + first + Packed<Cut>::column(i);
#pragma GCC unroll 4
        for (int band = 0; band < kBands; ++band) {
          const Words of_band = weights(tile, band, first, i);
#pragma GCC unroll 3
          for (int part = 0; part < Cut::kParts; ++part)
#pragma GCC unroll 6
            for (int m = 0; m < kM; ++m)
              multiply_add(products[m][band], of_band, pairs + m * Cut::kRow + part * kSteps);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int band = 0; band < kBands; ++band) {
      float* const sum = sums + m * kTile + band * kLanes;
      const Floats before = _mm512_load_ps(sum);
      _mm512_store_ps(sum, _mm512_fmadd_ps(scales[band], products[m][band], before));
    }
  }
}

template <typename Cut, typename Weights, int... kM>
constexpr auto adds_of(std::integer_sequence<int, kM...>) {
  return std::array{&add<Cut, Weights, kM + 1>...};
}

template <typename Cut, typename Weights>
constexpr auto kAdds = adds_of<Cut, Weights>(std::make_integer_sequence<int, kBlockRows>{});

// sums[rows][64] += a chunk times all rows of x. Up to a block of rows, weights go from the packed
// words straight into the products; beyond that they are decoded once.
template <typename Cut>
GRACE_SIMD void multiply(const Packed<Cut>& packed, uint32_t* decoded, const Floats* scales,
                         const uint32_t* x, int64_t rows, float* sums) {
  if (rows <= kBlockRows) return kAdds<Cut, Packed<Cut>>[rows - 1](packed, scales, x, sums);
  decode<Cut>(packed, decoded);
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t m = rows * i / blocks, count = rows * (i + 1) / blocks - m;
    kAdds<Cut, Decoded<Cut>>[count - 1]({decoded}, scales, x + m* Cut::kRow, sums + m* kTile);
  }
}

// --- rows of tiles ------------------------------------------------------------------------------

// Rows of tiles [begin, end) times all rows of x; `finish(tile)` is called once sums[rows][64] of
// a row of tiles are there.
template <typename Cut, typename F>
GRACE_SIMD void multiply_rows(const Problem& p, const uint32_t* qweight, const Scales& scales,
                              int64_t begin, int64_t end, const uint32_t* x, int64_t rows,
                              float* sums, const F& finish) {
  alignas(64) uint32_t decoded[Cut::kDecoded];
  const int64_t count = p.k_tiles / Cut::kTiles;
  const int64_t chunks_of_group = p.group_size / (Cut::kTiles * kTile);
  Chunks<Cut> chunks(qweight + begin * count * Cut::kPacked, qweight + end * count * Cut::kPacked);
  for (int64_t tile = begin; tile < end; ++tile) {
    std::fill_n(sums, rows * kTile, 0.0f);
    for (int64_t chunk = 0; chunk < count; ++chunk) {
      Floats of_bands[kBands];
      for (int band = 0; band < kBands; ++band)
        of_bands[band] = load_scales(scales, chunk / chunks_of_group, tile * kTile + band * kBand);
      prefetch_scales(scales, chunk / chunks_of_group, (tile + 1) * kTile);
      multiply<Cut>({chunks.words(), &chunks}, decoded, of_bands, x + chunk * rows * Cut::kRow,
                    rows, sums);
      chunks.turn();
    }
    finish(tile);
  }
}

// out[rows][n]: the sums of a row of tiles, the bias, and the one rounding to T.
template <typename T>
GRACE_SIMD void finish(const float* sums, int64_t rows, int64_t first, int64_t n, const T* bias,
                       T* out) {
  for (int64_t row = first; row < std::min(first + kTile, n); row += kLanes) {
    const auto there = static_cast<__mmask16>((1u << std::min<int64_t>(n - row, kLanes)) - 1);
    const Floats added = bias ? widen(bias + row, there).low : _mm512_setzero_ps();
    for (int64_t m = 0; m < rows; ++m) {
      const Floats sum = _mm512_load_ps(sums + m * kTile + row - first);
      store(out + m * n + row, there, _mm512_add_ps(sum, added));
    }
  }
}

// Up to kRowsAtOnce rows of x.
template <typename Cut, typename T = Cut::T>
void run_rows(const Call<T>& call, const T* x, int64_t rows, uint32_t* arranged, T* out) {
  using torch::stable::parallel_for;
  const Problem& p = call.problem;
  const int64_t chunks = p.k_tiles / Cut::kTiles;
  parallel_for(0, rows * chunks, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % rows, column = i / rows * Cut::kTiles * kTile;
      arrange<Cut>(x + row * p.k + column, p.k - column, arranged + i * Cut::kRow);
    }
  });
  parallel_for(0, p.n_tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch sums(rows * kTile);
    multiply_rows<Cut>(
        p, call.qweight, call.scales, begin, end, arranged, rows, sums.floats(),
        [&](int64_t tile) { finish(sums.floats(), rows, tile * kTile, p.n, call.bias, out); });
  });
}

template <typename Cut, typename T = Cut::T>
void run_cut(const Call<T>& call) {
  const Problem& p = call.problem;
  Scratch& arranged = kept_scratch();
  arranged.reserve(std::min(p.m, kRowsAtOnce) * (p.k_tiles / Cut::kTiles) * Cut::kRow);
  for (int64_t m = 0; m < p.m; m += kRowsAtOnce)
    run_rows<Cut>(call, call.x + m * p.k, std::min(p.m - m, kRowsAtOnce), arranged.words(),
                  call.out + m * p.n);
}

template <int kBits, typename T>
void run(const Call<T>& call) {
  if (call.problem.group_size / kTile % 2 == 0) return run_cut<Cut<kBits, T, 2>>(call);
  run_cut<Cut<kBits, T, 1>>(call);
}

}  // namespace grace::dequant_gemm::avx512bf16

#undef GRACE_SIMD_INLINE
#undef GRACE_SIMD
