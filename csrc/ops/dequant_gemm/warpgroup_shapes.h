// What the kernels of warpgroup.h are made for, and the work of one call.
#pragma once

#include <algorithm>

#include "common/bulk_copy.h"
#include "ops/dequant_gemm/tensor_core.h"

namespace grace::dequant_gemm {
namespace {

constexpr int kGroupThreads = 4 * kWarpSize;  // of a warpgroup
constexpr int kMostStages = 24;
constexpr int kBarrierBytes = 1024;
static_assert((2 * kMostStages + 1) * 8 <= kBarrierBytes);

template <int kTokens_, int kGroups_>
struct Shape {
  static constexpr int kTokens = kTokens_;  // rows of x
  static constexpr int kGroups = kGroups_;  // warpgroups that multiply
  static constexpr int kMultipliers = kGroups * kGroupThreads;
  static constexpr bool kWgmma = kTokens > 16;
  // With many sums the warps that multiply take registers over from a whole warpgroup that copies.
  static constexpr bool kTakesRegisters = kTokens * kGroups > 384;
  static constexpr int kThreads = kMultipliers + (kTakesRegisters ? kGroupThreads : kWarpSize);
  // Of a multiprocessor. While one multiplies, the other one, perhaps of the next kernel, fills its
  // ring; and where they share the work, the products of one hide behind the weights of the other.
  static constexpr int kBlocks = (kTokens <= 64 && kGroups == 2) || kTokens * kGroups <= 96 ? 2 : 1;
  static constexpr int kFragments = kTokens / 8;              // of sums, of a warp
  static constexpr int kAllFragments = kFragments * kGroups;  // of the block's warps of one number
  static constexpr int kSums = std::max(kTokens, 16) / 2;     // of a lane
  static constexpr int kStageTiles = kTokens < 256 ? 2 : 1;   // of K
  static constexpr int kXBytes = kTokens * kTile * 2;         // of a tile of K
};

// What a kernel is made for: `kWide` where a stage has one scale a row.
template <int kBits_, typename S_, bool kWide_, typename T_>
struct Kind {
  static constexpr int kBits = kBits_;
  static constexpr bool kWide = kWide_;
  using S = S_;
  using T = T_;

  // A stage of the ring: x, codes [warpgroup][tile], scales [group of K][row].
  static constexpr int kTileBytes = Layout<kBits>::kTileWords * 4;
  static constexpr int kCodes = S::kStageTiles * S::kXBytes;
  static constexpr int kScales = kCodes + S::kGroups * S::kStageTiles * kTileBytes;
  static constexpr int kScaleBytes = S::kGroups * kTile * 2;  // of a group of K
  static constexpr int kUsed = kScales + (kWide ? 1 : 2 * S::kStageTiles) * kScaleBytes;
  static constexpr int kBytes = (kUsed + 1023) / 1024 * 1024;  // x is swizzled from such multiples
};

struct Work {
  int pairs;                   // of tiles of K, the last one filled up
  int row_tiles, token_tiles;  // of the output
  int cluster, stages;
  int stage_scales;   // groups of K in a stage
  int scales_stages;  // stages that one group of K, if it is larger, goes on for
  bool bf16_scales;
};

struct Maps {
  CUtensorMap x, codes, scales;
};

// Rows of x of about so many columns of blocks are worked on at once: what is read of x and of the
// weight stays in the L2 cache meanwhile.
constexpr int kRaster = 16;

struct Output {
  int row_tile, token_tile;

  __device__ __forceinline__ Output(const Work& work, int index) {
    const int first = index / (work.row_tiles * kRaster) * kRaster;
    const int width = min(kRaster, work.token_tiles - first);
    const int within = index - first * work.row_tiles;
    token_tile = first + within % width;
    row_tile = within / width;
  }
};

}  // namespace
}  // namespace grace::dequant_gemm
