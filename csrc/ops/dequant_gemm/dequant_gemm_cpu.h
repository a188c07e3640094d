// What the vector kernels of dequant_gemm share, whatever the instruction set.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "common/tensor.h"
#include "ops/dequant_gemm/dequant_gemm.h"

namespace grace::dequant_gemm {

constexpr int kPrefetchBytes = 4096;  // weights are read in one stream and once
constexpr int64_t kRowsOfX = 64;      // rows of x for which a weight is dequantized once

// Floats in whole cache lines: a vector that straddles two costs two accesses.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : lines_((floats + kFloats - 1) / kFloats) {}
  float* data() { return lines_.front().floats; }
  void clear() { std::fill(lines_.begin(), lines_.end(), Line{}); }

 private:
  static constexpr int64_t kFloats = 16;
  struct alignas(64) Line {
    float floats[kFloats];
  };
  std::vector<Line> lines_;
};

// x in permuted order: [rows][k_tiles * 64].
struct Activations {
  const float* data;
  int64_t rows;
  int64_t stride;
};

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

}  // namespace grace::dequant_gemm
