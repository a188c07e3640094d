// A product of fp16 matrices on tensor cores, fp32 accumulation: four warps make one tile of
// kTile x kTile, each a quarter, from operands that travel through shared memory in kStages stages.
//
// In shared memory an operand's stage is
//   plain   [kTile rows][64 depths], 8 chunks of 16 bytes a row, chunk c of row r at c ^ r % 8
//   turned  [64 depths][kTile columns], 16 chunks a depth, chunk c of depth k at c ^ k % 8
// so that the eight rows which load_fragments reads together lie in different banks.
#pragma once

#include "common/async_copy.h"
#include "common/launch.h"
#include "common/mma.h"

namespace grace::cka {

constexpr int kTile = 128;
constexpr int kDepth = 64;  // of a product, a stage
constexpr int kStages = 3;
constexpr int kGroup = 128;  // threads that make a tile together
constexpr int kWarpTile = kTile / 2;
constexpr int kOperandBytes = kTile * kDepth * 2;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kTileBytes = kStages * kStageBytes;  // of shared memory, a group

// A thread's share of its warp's quarter of a tile, as fragments d of mma.h.
constexpr int kDown = kWarpTile / 16, kAcross = kWarpTile / 8;
using Accumulator = float[kDown][kAcross][4];

// Where fragment (i, j) of thread `thread` begins in the tile; elements 2 and 3 are 8 rows below.
GRACE_HOST_DEVICE int fragment_row(int i, int thread) {
  return thread / 64 * kWarpTile + i * 16 + thread % 32 / 4;
}
GRACE_HOST_DEVICE int fragment_column(int j, int thread) {
  return thread / 32 % 2 * kWarpTile + j * 8 + thread % 4 * 2;
}

// One operand of a tile: `extent` of its rows or columns exist, the others are zeros, as are depths
// from `depth` on. Plain: element (row, k) at row * pitch + k. Turned: at k * pitch + column.
struct Operand {
  const fp16* at;
  int64_t pitch;
  int extent;
  int depth;
  int64_t two_stages;  // from a stage to the one after the next, of a plain operand
};

GRACE_HOST_DEVICE Operand plain(const fp16* at, int64_t pitch, int extent, int depth) {
  return {at, pitch, extent, depth, 2 * kDepth};
}
GRACE_HOST_DEVICE Operand turned(const fp16* at, int64_t pitch, int extent, int depth) {
  return {at, pitch, extent, depth, 0};
}

// One thread's share of fetching an operand, stage after stage.
template <bool kTurned>
struct Fetch {
  static constexpr int kChunks = (kTurned ? kTile : kDepth) / 8;
  static constexpr int kLines = kGroup / kChunks;  // that the group fetches at a time

  const fp16* from;   // where the next stage begins
  int64_t step;       // to the next of this thread's lines
  int64_t even, odd;  // to the next stage, from an even and from an odd one
  int to;             // in a stage, bytes
  int across, down;   // elements that exist from here on in the line, and lines

  __device__ __forceinline__ Fetch(const Operand& x, int thread) {
    const int chunk = thread % kChunks, line = thread / kChunks;
    from = x.at + line * x.pitch + chunk * 8;
    step = kLines * x.pitch;
    even = kTurned ? kDepth * x.pitch : kDepth;
    odd = kTurned ? even : x.two_stages - kDepth;
    to = line * kChunks * 16 + (chunk ^ line % 8) * 16;
    across = (kTurned ? x.extent : x.depth) - chunk * 8;
    down = (kTurned ? x.depth : x.extent) - line;
  }

  __device__ __forceinline__ void next(unsigned char* stage, bool is_odd) {
    const int lines = across > 0 ? down : 0;
    const fp16* line = from;
#pragma unroll
    for (int i = 0; i < kOperandBytes / 16 / kGroup; ++i) {
      copy_async(stage + to + i * kGroup * 16, line, i * kLines < lines);
      line += step;
    }
    from += is_odd ? odd : even;
    (kTurned ? down : across) -= kDepth;
  }
};

// The 16 x 16 elements of operand a from row `first` and depth `k` on: one fragment a of mma.h.
template <bool kTurned>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* from, int first,
                                       int k) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kTurned) {
    const int depth = k + lane % 8 + lane / 16 * 8, chunk = first / 8 + lane / 8 % 2;
    load_fragments<true>(a, from + depth * kTile * 2 + (chunk ^ depth % 8) * 16);
  } else {
    const int row = first + lane % 16, chunk = k / 8 + lane / 16;
    load_fragments<false>(a, from + row * kDepth * 2 + (chunk ^ row % 8) * 16);
  }
}

// Those of operand b: the fragments b of columns `first` to + 7 and + 8 to + 15.
template <bool kTurned>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const unsigned char* from, int first,
                                       int k) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kTurned) {
    const int depth = k + lane % 16, chunk = first / 8 + lane / 16;
    load_fragments<true>(b, from + depth * kTile * 2 + (chunk ^ depth % 8) * 16);
  } else {
    const int row = first + lane % 8 + lane / 16 * 8, chunk = k / 8 + lane / 8 % 2;
    load_fragments<false>(b, from + row * kDepth * 2 + (chunk ^ row % 8) * 16);
  }
}

// `meanwhile` is called once there is something to multiply.
template <bool kTurnedA, bool kTurnedB, typename Meanwhile>
__device__ __forceinline__ void multiply_stage(Accumulator& tile, const unsigned char* a,
                                               const unsigned char* b, int row, int column,
                                               const Meanwhile& meanwhile) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t left[kDown][4], right[kAcross / 2][4];
#pragma unroll
    for (int i = 0; i < kDown; ++i) load_a<kTurnedA>(left[i], a, row + i * 16, k);
#pragma unroll
    for (int j = 0; j < kAcross / 2; ++j) load_b<kTurnedB>(right[j], b, column + j * 16, k);
    if (k == 0) meanwhile();
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const uint32_t of_b[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
        mma_m16n8k16<fp16>(tile[i][j], left[i], of_b);
      }
  }
}

GRACE_HOST_DEVICE int stages_of(const Operand& a) { return (a.depth + kDepth - 1) / kDepth; }

// Of the threads of this group, one of at most two; where it is emulated, of the block.
__device__ __forceinline__ void group_barrier() {
#if defined(GRACE_EMULATE)
  __syncthreads();
#else
  if (threadIdx.x < kGroup) {
    asm volatile("bar.sync 1, %0;" ::"n"(kGroup) : "memory");
  } else {
    asm volatile("bar.sync 2, %0;" ::"n"(kGroup) : "memory");
  }
#endif
}

// tile += a bᵀ by the group of this thread. All groups of the block call together with the same
// `stages`, at least their own. `same`: b is a, fetched once. Afterwards the group may write where
// its stages were.
template <bool kTurnedA, bool kTurnedB>
__device__ __forceinline__ void add_product(Accumulator& tile, const Operand& a, const Operand& b,
                                            bool same, int stages, unsigned char* shared) {
  const int thread = threadIdx.x % kGroup, own = stages_of(a);
  const int row = thread / 64 * kWarpTile, column = thread / 32 % 2 * kWarpTile;
  const bool needed = row < a.extent && column < b.extent;
  Fetch<kTurnedA> fetch_a(a, thread);
  Fetch<kTurnedB> fetch_b(b, thread);
  int next = 0, next_slot = 0, slot = 0;
  const auto fetch_stage = [&] {
    if (next < own) {
      unsigned char* const to = shared + next_slot * kStageBytes;
      fetch_a.next(to, next % 2 != 0);
      if (!same) fetch_b.next(to + kOperandBytes, next % 2 != 0);
    }
    commit_copies();
    ++next;
    next_slot = next_slot == kStages - 1 ? 0 : next_slot + 1;
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fetch_stage();
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<kStages - 2>();
    group_barrier();
    const unsigned char* const at = shared + slot * kStageBytes;
    if (needed && stage < own) {
      multiply_stage<kTurnedA, kTurnedB>(tile, at, same ? at : at + kOperandBytes, row, column,
                                         fetch_stage);
    } else {
      fetch_stage();
    }
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  wait_for_copies<0>();
  group_barrier();
}

// Rows of an fp32 tile in shared memory: padded, so that fragments are stored without conflicts.
constexpr int kSharedPitch = kTile + 8;
constexpr int kSharedTile = kTile * kSharedPitch;  // floats

__device__ __forceinline__ void store_fragment(float* tile, int row, int column,
                                               const float (&d)[4]) {
  float* const to = tile + row * kSharedPitch + column;
  *reinterpret_cast<float2*>(to) = {d[0], d[1]};
  *reinterpret_cast<float2*>(to + 8 * kSharedPitch) = {d[2], d[3]};
}

__device__ __forceinline__ void store_tile(float* shared, const Accumulator& tile) {
  const int thread = threadIdx.x % kGroup;
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int j = 0; j < kAcross; ++j)
      store_fragment(shared, fragment_row(i, thread), fragment_column(j, thread), tile[i][j]);
}

}  // namespace grace::cka
