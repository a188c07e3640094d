// dequant_gemm on a CPU with AVX2, FMA and F16C: compiled in every x86-64 build, chosen at run
// time.
//
// What the four lanes that share gid hold lies together, so rows gid and gid + 8 of a band are runs
// of eight words, two runs for 64 columns at 4 bits and four at 8. One field of each of the eight
// words makes a vector of eight weights of one row:
//
//   4 bits: field 2v is row gid, field 2v + 1 row gid + 8, v = 0..3     8 bits: the same, v = 0..1
//
// Activations are permuted to that order of columns once a call. Each output is summed along K in
// eight parts, always in the same order, so that it does not depend on the other rows of x.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/tensor.h"
#include "ops/dequant_gemm/dequant_gemm.h"

#define GRACE_AVX2 __attribute__((target("avx2,fma,f16c")))
#define GRACE_AVX2_INLINE GRACE_AVX2 inline __attribute__((always_inline))

namespace grace::dequant_gemm::avx2 {

constexpr int kLanes = 8;        // floats of a vector
constexpr int kFewRows = 4;      // up to here weights go from registers straight into sums
constexpr int kTilesAtOnce = 4;  // else a band of so many tiles is dequantized into the L1 cache
constexpr int kPrefetchBytes = 4096;
constexpr int64_t kRowsOfX = 64;  // rows of x that are permuted, and summed, at a time

template <int kBits>
constexpr int kVectors = 16 / kBits;  // of a row, from a run of eight words

template <int kBits>
constexpr int kRuns = kBits / 2;  // of a row pair in a tile

// The column of a tile that stands at element i of a row in permuted order.
template <int kBits>
constexpr int column_of(int i) {
  const int v = i / kLanes % kVectors<kBits>, run = i / (kLanes * kVectors<kBits>);
  const int word = run % 2 * kLanes + i % kLanes, tig = word / 4;
  if (kBits == 4) return word % 4 * kBlock + 2 * tig + v % 2 * 8 + v / 2;
  return (run / 2 * 2 + word / 2 % 2) * kBlock + 2 * tig + word % 2 * 8 + v;
}

template <int kBits>
constexpr std::array<int, kTile> kColumns = [] {
  std::array<int, kTile> columns{};
  for (int i = 0; i < kTile; ++i) columns[i] = column_of<kBits>(i);
  return columns;
}();

// --- activations --------------------------------------------------------------------------------

GRACE_AVX2_INLINE __m256 load_floats(const float* x) { return _mm256_loadu_ps(x); }

GRACE_AVX2_INLINE __m256 load_floats(const bf16* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

GRACE_AVX2_INLINE __m256 load_floats(const fp16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// One row of x in fp32, each tile in permuted order, zeros up to a whole tile.
template <int kBits, typename T>
GRACE_AVX2 void permute_row(const T* x, int64_t k, float* permuted) {
  alignas(32) float natural[kTile];
  for (int64_t first = 0; first < k; first += kTile) {
    if (first + kTile <= k) {
      for (int i = 0; i < kTile; i += kLanes)
        _mm256_store_ps(natural + i, load_floats(x + first + i));
    } else {
      for (int i = 0; i < kTile; ++i) natural[i] = first + i < k ? to_float(x[first + i]) : 0.0f;
    }
    for (int i = 0; i < kTile; ++i) permuted[first + i] = natural[kColumns<kBits>[i]];
  }
}

// --- weights ------------------------------------------------------------------------------------

// A run of a row pair, every code in two's complement: packing had added what is its top bit.
template <int kBits>
GRACE_AVX2_INLINE __m256i load_run(const uint32_t* band, int gid, int run) {
  const uint32_t* words = band + run / 2 * 128 + gid * 16 + run % 2 * kLanes;
  // Weights are read in one stream and once: their latency is hidden here, and may pass the end.
  _mm_prefetch(reinterpret_cast<const char*>(words) + kPrefetchBytes, _MM_HINT_T0);
  const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  return _mm256_xor_si256(stored, _mm256_set1_epi32(kBits == 4 ? 0x88888888 : 0x80808080));
}

// One field of eight words times the scale, rounded once as q * s of the reference is.
template <int kBits>
GRACE_AVX2_INLINE __m256 weights_of(__m256i words, int field, __m256 scale) {
  const __m256i at_top = _mm256_slli_epi32(words, 32 - kBits * (field + 1));
  const __m256i codes = _mm256_srai_epi32(at_top, 32 - kBits);
  return _mm256_mul_ps(_mm256_cvtepi32_ps(codes), scale);
}

// Scales of a row of tiles in fp32, [groups][64 rows].
inline void load_scales(const Scales& scales, int64_t groups, int64_t first_row, float* loaded) {
  for (int64_t g = 0; g < groups; ++g)
    for (int r = 0; r < kTile; ++r) loaded[g * kTile + r] = scales.at(g, first_row + r);
}

// Where the scales of one tile are among them: `of_block[b] + row`.
struct TileScales {
  bool one_group;
  const float* of_block[kBlocksPerTile];

  TileScales(const float* loaded, const Problem& p, int64_t tile)
      : one_group(p.group_size % kTile == 0) {
    for (int b = 0; b < (one_group ? 1 : kBlocksPerTile); ++b) {
      // Beyond k the codes are zero, so that any scale will do.
      const int64_t column = std::min(tile * kTile + b * kBlock, p.k - 1);
      of_block[b] = loaded + column / p.group_size * kTile;
    }
  }
};

// Scales for a run of a row: one value, or one for each of the blocks that the run holds.
template <int kBits>
GRACE_AVX2_INLINE __m256 scale_of_run(const TileScales& scales, int run, int row) {
  if (scales.one_group) return _mm256_broadcast_ss(scales.of_block[0] + row);
  const __m128 four = _mm_setr_ps(scales.of_block[0][row], scales.of_block[1][row],
                                  scales.of_block[2][row], scales.of_block[3][row]);
  const __m256 all = _mm256_set_m128(four, four);
  if constexpr (kBits == 4) return all;
  return run / 2 == 0 ? _mm256_unpacklo_ps(all, all) : _mm256_unpackhi_ps(all, all);
}

// --- products -----------------------------------------------------------------------------------

// sums[64][kM][8] += one tile times kM rows of x, weights passing through registers only.
template <int kBits, int kM>
GRACE_AVX2 void add_few(const uint32_t* tile, const TileScales& scales, const float* x,
                        int64_t x_stride, float* sums) {
  for (int pair = 0; pair < kTile / 2; ++pair) {
    const int gid = pair % 8, row = pair / 8 * kBand + gid;
    const uint32_t* const band = tile + pair / 8 * Layout<kBits>::kBandWords;
    float* const low_sums = sums + row * kM * kLanes;
    float* const high_sums = sums + (row + 8) * kM * kLanes;
    __m256 low[kM], high[kM];
    for (int m = 0; m < kM; ++m) {
      low[m] = _mm256_loadu_ps(low_sums + m * kLanes);
      high[m] = _mm256_loadu_ps(high_sums + m * kLanes);
    }
#pragma GCC unroll 4
    for (int run = 0; run < kRuns<kBits>; ++run) {
      const __m256i words = load_run<kBits>(band, gid, run);
      const __m256 low_scale = scale_of_run<kBits>(scales, run, row);
      const __m256 high_scale = scale_of_run<kBits>(scales, run, row + 8);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors<kBits>; ++v) {
        const __m256 low_weights = weights_of<kBits>(words, 2 * v, low_scale);
        const __m256 high_weights = weights_of<kBits>(words, 2 * v + 1, high_scale);
        for (int m = 0; m < kM; ++m) {
          const __m256 xs =
              _mm256_loadu_ps(x + m * x_stride + (run * kVectors<kBits> + v) * kLanes);
          low[m] = _mm256_fmadd_ps(low_weights, xs, low[m]);
          high[m] = _mm256_fmadd_ps(high_weights, xs, high[m]);
        }
      }
    }
    for (int m = 0; m < kM; ++m) {
      _mm256_storeu_ps(low_sums + m * kLanes, low[m]);
      _mm256_storeu_ps(high_sums + m * kLanes, high[m]);
    }
  }
}

// weights[16 rows][stride]: one band of a tile, in permuted order.
template <int kBits>
GRACE_AVX2 void dequantize(const uint32_t* tile, int band_index, const TileScales& scales,
                           float* weights, int64_t stride) {
  const uint32_t* const band = tile + band_index * Layout<kBits>::kBandWords;
  for (int gid = 0; gid < kBand / 2; ++gid) {
    const int row = band_index * kBand + gid;
#pragma GCC unroll 4
    for (int run = 0; run < kRuns<kBits>; ++run) {
      const __m256i words = load_run<kBits>(band, gid, run);
      const __m256 low_scale = scale_of_run<kBits>(scales, run, row);
      const __m256 high_scale = scale_of_run<kBits>(scales, run, row + 8);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors<kBits>; ++v) {
        float* const low = weights + gid * stride + (run * kVectors<kBits> + v) * kLanes;
        _mm256_storeu_ps(low, weights_of<kBits>(words, 2 * v, low_scale));
        _mm256_storeu_ps(low + 8 * stride, weights_of<kBits>(words, 2 * v + 1, high_scale));
      }
    }
  }
}

// sums[4 rows][kM][8] += 4 rows of weights times kM rows of x, `length` columns.
template <int kM>
GRACE_AVX2 void add_block(const float* weights, int64_t stride, const float* x, int64_t x_stride,
                          int64_t length, float* sums, int64_t sums_stride) {
  constexpr int kRows = 4;
  __m256 total[kRows][kM];
  for (int r = 0; r < kRows; ++r)
    for (int m = 0; m < kM; ++m) total[r][m] = _mm256_loadu_ps(sums + r * sums_stride + m * kLanes);
  for (int64_t i = 0; i < length; i += kLanes) {
    __m256 xs[kM];
    for (int m = 0; m < kM; ++m) xs[m] = _mm256_loadu_ps(x + m * x_stride + i);
    for (int r = 0; r < kRows; ++r) {
      const __m256 w = _mm256_loadu_ps(weights + r * stride + i);
      for (int m = 0; m < kM; ++m) total[r][m] = _mm256_fmadd_ps(w, xs[m], total[r][m]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int m = 0; m < kM; ++m) _mm256_storeu_ps(sums + r * sums_stride + m * kLanes, total[r][m]);
}

// sums[16 rows][rows][8] += a dequantized band times all rows of x.
GRACE_AVX2 inline void add_many(const float* weights, int64_t length, const float* x,
                                int64_t x_stride, int64_t rows, float* sums) {
  constexpr auto kAddBlock = std::array{&add_block<1>, &add_block<2>, &add_block<3>};
  const int64_t stride = rows * kLanes;
  for (int64_t m = 0; m < rows; m += 3) {
    const auto add = kAddBlock[std::min<int64_t>(rows - m, 3) - 1];
    for (int r = 0; r < kBand; r += 4)
      add(weights + r * length, length, x + m * x_stride, x_stride, length,
          sums + r * stride + m * kLanes, stride);
  }
}

GRACE_AVX2_INLINE float sum_of(const float* parts) {
  const __m256 all = _mm256_loadu_ps(parts);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// --- rows of tiles ------------------------------------------------------------------------------

// x in permuted order: [rows][k_tiles * 64].
struct Activations {
  const float* data;
  int64_t rows;
  int64_t stride;
};

// sums[64][rows][8]: a row of tiles times one to kFewRows rows of x.
template <int kBits, int kM>
GRACE_AVX2 void multiply_few(const Problem& p, const uint32_t* tiles, const float* scales,
                             const Activations& x, float* sums) {
  for (int64_t tile = 0; tile < p.k_tiles; ++tile) {
    add_few<kBits, kM>(tiles + tile * Layout<kBits>::kTileWords, TileScales(scales, p, tile),
                       x.data + tile * kTile, x.stride, sums);
  }
}

// The same for any number of rows: every weight is dequantized once for all of them.
template <int kBits>
GRACE_AVX2 void multiply_many(const Problem& p, const uint32_t* tiles, const float* scales,
                              const Activations& x, float* sums) {
  alignas(32) float weights[kBand * kTilesAtOnce * kTile];
  for (int64_t first = 0; first < p.k_tiles; first += kTilesAtOnce) {
    const int64_t count = std::min<int64_t>(kTilesAtOnce, p.k_tiles - first);
    for (int band = 0; band < kTile / kBand; ++band) {
      for (int64_t i = 0; i < count; ++i) {
        dequantize<kBits>(tiles + (first + i) * Layout<kBits>::kTileWords, band,
                          TileScales(scales, p, first + i), weights + i * kTile, count * kTile);
      }
      add_many(weights, count * kTile, x.data + first * kTile, x.stride, x.rows,
               sums + band * kBand * x.rows * kLanes);
    }
  }
}

template <int kBits>
void multiply(const Problem& p, const uint32_t* tiles, const float* scales, const Activations& x,
              float* sums) {
  switch (x.rows) {
    case 1:
      return multiply_few<kBits, 1>(p, tiles, scales, x, sums);
    case 2:
      return multiply_few<kBits, 2>(p, tiles, scales, x, sums);
    case 3:
      return multiply_few<kBits, 3>(p, tiles, scales, x, sums);
    case 4:
      return multiply_few<kBits, 4>(p, tiles, scales, x, sums);
    default:
      return multiply_many<kBits>(p, tiles, scales, x, sums);
  }
}

// out[rows][n]: sums of one row of tiles, the bias, and the one rounding to T.
template <typename T>
GRACE_AVX2 void store(const float* sums, int64_t rows, int64_t first, int64_t n, const T* bias,
                      T* out) {
  const int64_t last = std::min<int64_t>(first + kTile, n);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t row = first; row < last; ++row) {
      const float sum = sum_of(sums + ((row - first) * rows + m) * kLanes);
      out[m * n + row] = from_float<T>(bias ? sum + to_float(bias[row]) : sum);
    }
  }
}

template <int kBits, typename T>
void run(const Call<T>& call) {
  const Problem& p = call.problem;
  const int64_t stride = p.k_tiles * kTile;
  std::vector<float> permuted(std::min(p.m, kRowsOfX) * stride);
  for (int64_t m = 0; m < p.m; m += kRowsOfX) {
    const Activations x{permuted.data(), std::min(kRowsOfX, p.m - m), stride};
    torch::stable::parallel_for(0, x.rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        permute_row<kBits>(call.x + (m + row) * p.k, p.k, permuted.data() + row * stride);
    });
    torch::stable::parallel_for(0, p.n_tiles, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scales(kTile * p.groups()), sums(kTile * x.rows * kLanes);
      for (int64_t tile = begin; tile < end; ++tile) {
        load_scales(call.scales, p.groups(), tile * kTile, scales.data());
        std::fill(sums.begin(), sums.end(), 0.0f);
        multiply<kBits>(p, call.qweight + tile * p.k_tiles * Layout<kBits>::kTileWords,
                        scales.data(), x, sums.data());
        store(sums.data(), x.rows, tile * kTile, p.n, call.bias, call.out + m * p.n);
      }
    });
  }
}

}  // namespace grace::dequant_gemm::avx2
