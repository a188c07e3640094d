// The ring of stages of warpgroup.h, and the warp that keeps it full.
#pragma once

#include "common/bulk_copy.h"
#include "common/cluster.h"
#include "ops/dequant_gemm/warpgroup_shapes.h"

namespace grace::dequant_gemm {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The ring of stages as a warp walks it: addresses in shared memory, and the parity of this round.
template <typename K>
class Ring {
 public:
  __device__ __forceinline__ Ring(uint32_t stages, uint32_t barriers, int count)
      : first_stage_(stages),
        stage_(stages),
        first_barrier_(barriers),
        end_(barriers + count * 8),
        barrier_(barriers) {}

  __device__ __forceinline__ uint32_t stage() const { return stage_; }
  __device__ __forceinline__ int parity() const { return parity_; }
  // All bytes of the stage have come; its bytes were used by all warps.
  __device__ __forceinline__ uint32_t full() const { return barrier_; }
  __device__ __forceinline__ uint32_t empty() const { return barrier_ + kMostStages * 8; }

  __device__ __forceinline__ void init() const {
    for (uint32_t barrier = first_barrier_; barrier < end_; barrier += 8) {
      init_barrier(barrier, 1);
      init_barrier(barrier + kMostStages * 8, K::S::kMultipliers / kWarpSize);
    }
    fence_barriers();
  }

  __device__ __forceinline__ void next() {
    stage_ += K::kBytes;
    barrier_ += 8;
    if (barrier_ == end_) {
      stage_ = first_stage_;
      barrier_ = first_barrier_;
      parity_ ^= 1;
    }
  }

 private:
  const uint32_t first_stage_;
  uint32_t stage_;
  const uint32_t first_barrier_, end_;
  uint32_t barrier_;
  int parity_ = 0;
};

// --- the warp that copies ------------------------------------------------------------------------

template <typename K>
class Copier {
  using S = typename K::S;

 public:
  __device__ __forceinline__ Copier(const Maps& maps, const Work& work, const Ring<K>& ring,
                                    int first_pair, int last_pair)
      : maps_(maps),
        work_(work),
        ring_(ring),
        first_(first_pair * 2 / S::kStageTiles),
        last_(last_pair * 2 / S::kStageTiles),
        bytes_(K::kScales + work.stage_scales * K::kScaleBytes) {}

  __device__ __forceinline__ void run(int index, int step) {
    const int outputs = work_.row_tiles * work_.token_tiles;
    if (index >= outputs) return;
    prefetch_map(maps_.codes);
    prefetch_map(maps_.scales);
    prefetch_map(maps_.x);
    // Weights are no kernel's output: their first copies start before the kernel ahead has ended.
    const Output first(work_, index);
    const int ahead = min(work_.stages, last_ - first_);
    Ring<K> early = ring_;
    Group group(work_, first_);
    for (int i = first_; i < first_ + ahead; ++i, early.next()) {
      weights(early, first, i, group.row);
      group.next(work_);
    }
    wait_for_previous_kernel();
    for (int i = first_; i < first_ + ahead; ++i, ring_.next()) x(first, i);
    copy(first, first_ + ahead, group);
    for (index += step; index < outputs; index += step)
      copy(Output(work_, index), first_, Group(work_, first_));
  }

 private:
  // The rows of the scales, stage by stage.
  struct Group {
    int row, left;

    __device__ __forceinline__ Group(const Work& work, int stage) {
      row = stage / work.scales_stages * work.stage_scales;
      left = work.scales_stages - stage % work.scales_stages;
    }
    __device__ __forceinline__ void next(const Work& work) {
      if (--left > 0) return;
      row += work.stage_scales;
      left = work.scales_stages;
    }
  };

  __device__ __forceinline__ void copy(const Output& output, int i, Group group) {
    for (; i < last_; ++i, ring_.next()) {
      wait_for(ring_.empty(), ring_.parity() ^ 1);
      weights(ring_, output, i, group.row);
      x(output, i);
      group.next(work_);
    }
  }

  __device__ __forceinline__ void weights(const Ring<K>& ring, const Output& output, int i,
                                          int scales_row) const {
    const int first = output.row_tile * S::kGroups;
    warp_expect_bytes(ring.full(), bytes_);
    warp_copy_box_4d(ring.stage() + K::kCodes, maps_.codes, i * S::kStageTiles, first, ring.full());
    warp_copy_box(ring.stage() + K::kScales, maps_.scales, first * kTile, scales_row, ring.full());
  }

  __device__ __forceinline__ void x(const Output& output, int i) const {
#pragma unroll
    for (int j = 0; j < S::kStageTiles; ++j)
      warp_copy_box(ring_.stage() + j * S::kXBytes, maps_.x, (i * S::kStageTiles + j) * kTile,
                    output.token_tile * S::kTokens, ring_.full());
  }

  const Maps& maps_;
  const Work& work_;
  Ring<K> ring_;
  const int first_, last_, bytes_;
};

#endif

}  // namespace
}  // namespace grace::dequant_gemm
