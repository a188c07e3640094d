// The vector kernel of dequant_gemm on CPUs, compiled once for each instruction set: included
// inside the set's namespace, after GRACE_SIMD and the vectors (see dequant_gemm_avx2.h).
//
// What the four lanes of a warp that share gid hold lies together: rows gid and gid + 8 of a band
// are a strip of 16 words, one strip for 64 columns at 4 bits, two at 8. The vectors read a strip
// in runs of kLanes words, and the same field of each word makes kLanes weights of one row:
//
//   4 bits: field 2v is row gid, field 2v + 1 row gid + 8, v = 0..3     8 bits: the same, v = 0..1
//
// Activations are permuted to that order of columns once a call. Each output is summed along K in
// kLanes parts, always in the same order, so that it does not depend on the other rows of x.

constexpr int kStrip = 16;
constexpr int kRunsOfStrip = kStrip / kLanes;
constexpr int kTilesAtOnce = 8;  // a band of so many tiles is dequantized into the L1 cache

template <int kBits>
constexpr int kVectors = 16 / kBits;  // of a row, from a run

template <int kBits>
constexpr int kRuns = kBits / 4 * kRunsOfStrip;  // of a row pair in a tile

// The column of a tile that stands at element i of a row in permuted order.
template <int kBits>
constexpr int column_of(int i) {
  const int v = i / kLanes % kVectors<kBits>, run = i / (kLanes * kVectors<kBits>);
  const int strip = run / kRunsOfStrip, word = run % kRunsOfStrip * kLanes + i % kLanes;
  const int tig = word / 4;
  if (kBits == 4) return word % 4 * kBlock + v % 2 * 8 + 2 * tig + v / 2;
  return (strip * 2 + word / 2 % 2) * kBlock + word % 2 * 8 + 2 * tig + v;
}

template <int kBits>
constexpr std::array<int, kTile> kColumns = [] {
  std::array<int, kTile> columns{};
  for (int i = 0; i < kTile; ++i) columns[i] = column_of<kBits>(i);
  return columns;
}();

// --- activations --------------------------------------------------------------------------------

// One row of x in fp32, each tile in permuted order, zeros up to a whole tile.
template <int kBits, typename T>
GRACE_SIMD void permute_row(const T* x, int64_t k, float* permuted) {
  alignas(64) float natural[kTile];
  for (int64_t first = 0; first < k; first += kTile) {
    if (first + kTile <= k) {
      for (int i = 0; i < kTile; i += kLanes) store(natural + i, load(x + first + i));
    } else {
      for (int i = 0; i < kTile; ++i) natural[i] = first + i < k ? to_float(x[first + i]) : 0.0f;
    }
    for (int i = 0; i < kTile; ++i) permuted[first + i] = natural[kColumns<kBits>[i]];
  }
}

// --- weights ------------------------------------------------------------------------------------

// A run of the row pair gid, gid + 8 of a band.
template <int kBits>
GRACE_SIMD_INLINE Words load_run(const uint32_t* band, int gid, int run) {
  const uint32_t* words =
      band + run / kRunsOfStrip * 128 + gid * kStrip + run % kRunsOfStrip * kLanes;
  // May pass the end: a prefetch never faults.
  __builtin_prefetch(reinterpret_cast<const char*>(words) + kPrefetchBytes);
  return load_words<kBits>(words);
}

// Scales for a run of a row: one value, or one for each of the blocks that the run holds.
template <int kBits>
GRACE_SIMD_INLINE Floats scale_of_run(const TileScales& scales, int run, int row) {
  if (scales.one_group) return spread(scales.of_block[0][row]);
  const __m128 of_block = _mm_setr_ps(scales.of_block[0][row], scales.of_block[1][row],
                                      scales.of_block[2][row], scales.of_block[3][row]);
  return spread_blocks<kBits>(of_block, run / kRunsOfStrip);
}

// --- products -----------------------------------------------------------------------------------

// sums[64][kM][kLanes] += one tile times kM rows of x, weights passing through registers only.
template <int kBits, int kM>
GRACE_SIMD void add_few(const uint32_t* tile, const TileScales& scales, const float* x,
                        int64_t x_stride, float* sums) {
  for (int pair = 0; pair < kTile / 2; ++pair) {
    const int gid = pair % 8, row = pair / 8 * kBand + gid;
    const uint32_t* const band = tile + pair / 8 * Layout<kBits>::kBandWords;
    float* const low_sums = sums + row * kM * kLanes;
    float* const high_sums = sums + (row + 8) * kM * kLanes;
    Floats low[kM], high[kM];
    for (int m = 0; m < kM; ++m) {
      low[m] = load(low_sums + m * kLanes);
      high[m] = load(high_sums + m * kLanes);
    }
#pragma GCC unroll 4
    for (int run = 0; run < kRuns<kBits>; ++run) {
      const Words words = load_run<kBits>(band, gid, run);
      const Floats low_scale = scale_of_run<kBits>(scales, run, row);
      const Floats high_scale = scale_of_run<kBits>(scales, run, row + 8);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors<kBits>; ++v) {
        const Floats low_weights = weights_of<kBits>(words, 2 * v, low_scale);
        const Floats high_weights = weights_of<kBits>(words, 2 * v + 1, high_scale);
        for (int m = 0; m < kM; ++m) {
          const Floats xs = load(x + m * x_stride + (run * kVectors<kBits> + v) * kLanes);
          low[m] = multiply_add(low_weights, xs, low[m]);
          high[m] = multiply_add(high_weights, xs, high[m]);
        }
      }
    }
    for (int m = 0; m < kM; ++m) {
      store(low_sums + m * kLanes, low[m]);
      store(high_sums + m * kLanes, high[m]);
    }
  }
}

// weights[16 rows][stride]: one band of a tile, in permuted order.
template <int kBits>
GRACE_SIMD void dequantize(const uint32_t* tile, int band_index, const TileScales& scales,
                           float* weights, int64_t stride) {
  const uint32_t* const band = tile + band_index * Layout<kBits>::kBandWords;
  for (int gid = 0; gid < kBand / 2; ++gid) {
    const int row = band_index * kBand + gid;
#pragma GCC unroll 4
    for (int run = 0; run < kRuns<kBits>; ++run) {
      const Words words = load_run<kBits>(band, gid, run);
      const Floats low_scale = scale_of_run<kBits>(scales, run, row);
      const Floats high_scale = scale_of_run<kBits>(scales, run, row + 8);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors<kBits>; ++v) {
        float* const low = weights + gid * stride + (run * kVectors<kBits> + v) * kLanes;
        store(low, weights_of<kBits>(words, 2 * v, low_scale));
        store(low + 8 * stride, weights_of<kBits>(words, 2 * v + 1, high_scale));
      }
    }
  }
}

// sums[4 rows][kM][kLanes] += 4 rows of weights times kM rows of x, `length` columns.
template <int kM>
GRACE_SIMD void add_block(const float* weights, int64_t stride, const float* x, int64_t x_stride,
                          int64_t length, float* sums, int64_t sums_stride) {
  constexpr int kRows = 4;
  Floats total[kRows][kM];
  for (int r = 0; r < kRows; ++r)
    for (int m = 0; m < kM; ++m) total[r][m] = load(sums + r * sums_stride + m * kLanes);
  for (int64_t i = 0; i < length; i += kLanes) {
    Floats xs[kM];
    for (int m = 0; m < kM; ++m) xs[m] = load(x + m * x_stride + i);
    for (int r = 0; r < kRows; ++r) {
      const Floats w = load(weights + r * stride + i);
      for (int m = 0; m < kM; ++m) total[r][m] = multiply_add(w, xs[m], total[r][m]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int m = 0; m < kM; ++m) store(sums + r * sums_stride + m * kLanes, total[r][m]);
}

template <int... kM>
constexpr auto blocks_of(std::integer_sequence<int, kM...>) {
  return std::array{&add_block<kM + 1>...};
}

// sums[16 rows][rows][kLanes] += a dequantized band times all rows of x.
GRACE_SIMD inline void add_many(const float* weights, int64_t length, const float* x,
                                int64_t x_stride, int64_t rows, float* sums) {
  constexpr auto kBlocks = blocks_of(std::make_integer_sequence<int, kBlockRows>{});
  const int64_t stride = rows * kLanes;
  for (int64_t m = 0; m < rows; m += kBlockRows) {
    const auto add = kBlocks[std::min<int64_t>(rows - m, kBlockRows) - 1];
    for (int r = 0; r < kBand; r += 4)
      add(weights + r * length, length, x + m * x_stride, x_stride, length,
          sums + r * stride + m * kLanes, stride);
  }
}

// --- rows of tiles ------------------------------------------------------------------------------

// sums[64][rows][kLanes]: a row of tiles times one to kFewRows rows of x.
template <int kBits, int kM>
GRACE_SIMD void multiply_few(const Problem& p, const uint32_t* tiles, const float* scales,
                             const Activations& x, float* sums) {
  for (int64_t tile = 0; tile < p.k_tiles; ++tile) {
    add_few<kBits, kM>(tiles + tile * Layout<kBits>::kTileWords, TileScales(scales, p, tile),
                       x.data + tile * kTile, x.stride, sums);
  }
}

// The same for any number of rows: every weight is dequantized once for all of them.
template <int kBits>
GRACE_SIMD void multiply_many(const Problem& p, const uint32_t* tiles, const float* scales,
                              const Activations& x, float* sums) {
  alignas(64) float weights[kBand * kTilesAtOnce * kTile];
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

template <int kBits, int... kM>
constexpr auto few_of(std::integer_sequence<int, kM...>) {
  return std::array{&multiply_few<kBits, kM + 1>...};
}

template <int kBits>
void multiply(const Problem& p, const uint32_t* tiles, const float* scales, const Activations& x,
              float* sums) {
  constexpr auto kFew = few_of<kBits>(std::make_integer_sequence<int, kFewRows>{});
  const auto multiply = x.rows <= kFewRows ? kFew[x.rows - 1] : &multiply_many<kBits>;
  multiply(p, tiles, scales, x, sums);
}

// out[rows][n]: sums of one row of tiles, the bias, and the one rounding to T.
template <typename T>
GRACE_SIMD void finish(const float* sums, int64_t rows, int64_t first, int64_t n, const T* bias,
                       T* out) {
  const int64_t last = std::min<int64_t>(first + kTile, n);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t row = first; row < last; ++row) {
      const float sum = sum_of(load(sums + ((row - first) * rows + m) * kLanes));
      out[m * n + row] = from_float<T>(bias ? sum + to_float(bias[row]) : sum);
    }
  }
}

template <int kBits, typename T>
void run(const Call<T>& call) {
  const Problem& p = call.problem;
  // Rows a power of two apart would share a few lines of the cache.
  const int64_t stride = p.k_tiles * kTile + kStrip;
  Buffer permuted(std::min(p.m, kRowsOfX) * stride);
  for (int64_t m = 0; m < p.m; m += kRowsOfX) {
    const Activations x{permuted.data(), std::min(kRowsOfX, p.m - m), stride};
    torch::stable::parallel_for(0, x.rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        permute_row<kBits>(call.x + (m + row) * p.k, p.k, permuted.data() + row * stride);
    });
    torch::stable::parallel_for(0, p.n_tiles, 1, [&](int64_t begin, int64_t end) {
      Buffer scales(kTile * p.groups()), sums(kTile * x.rows * kLanes);
      for (int64_t tile = begin; tile < end; ++tile) {
        load_scales(call.scales, p.groups(), tile * kTile, scales.data());
        sums.clear();
        multiply<kBits>(p, call.qweight + tile * p.k_tiles * Layout<kBits>::kTileWords,
                        scales.data(), x, sums.data());
        finish(sums.data(), x.rows, tile * kTile, p.n, call.bias, call.out + m * p.n);
      }
    });
  }
}
