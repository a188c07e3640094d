// The ring of stages through which operands reach wgmma: a stage has 64 depths of both operands of
// a tile, by blocks of 64 rows (or, turned, columns), 8 KiB each. One warp keeps it full, three
// warpgroups multiply, 64 rows of the tile each.
#pragma once

#include "common/bulk_copy.h"
#include "common/cluster.h"
#include "common/wgmma.h"
#include "ops/cka/warpgroup_tiles.h"

namespace grace::cka::warpgroup {

constexpr int kStages = 4;
constexpr int kCluster = 2;                      // thread blocks
constexpr int kGroup = 128;                      // threads of a warpgroup
constexpr int kMultipliers = kSide * kGroup;     // threads that multiply
constexpr int kThreads = kMultipliers + kGroup;  // of the last warpgroup only a warp works
constexpr int kMultiplierWarps = kMultipliers / kWarpSize;
constexpr int kBlockBytes = kBlock * kDepth * 2;
constexpr int kOperandBytes = kSide * kBlockBytes;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 2 * kStages * 8;  // 1024: to align

// Kept rows, as the copy engine fetches blocks of them.
struct Maps {
  CUtensorMap rows[2];  // of the student, of the teacher
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A warp's walk along the ring.
class Ring {
 public:
  __device__ __forceinline__ explicit Ring(uint32_t shared) : stages_(shared) {}

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(barriers() + i * 8, 1);
      init_barrier(barriers() + (kStages + i) * 8, kCluster * kMultiplierWarps);
    }
    fence_barriers();
  }

  __device__ __forceinline__ uint32_t stage() const { return stages_ + slot_ * kStageBytes; }
  __device__ __forceinline__ uint32_t full() const { return barriers() + slot_ * 8; }
  __device__ __forceinline__ uint32_t empty() const { return full() + kStages * 8; }
  __device__ __forceinline__ int parity() const { return parity_; }
  // The same of the stage so many stages ago, fewer than there are.
  __device__ __forceinline__ uint32_t empty_before(int stages) const {
    return barriers() + (kStages + (slot_ + kStages - stages) % kStages) * 8;
  }
  // Which of the two fetches what both need.
  __device__ __forceinline__ int turn() const { return slot_ % kCluster; }

  __device__ __forceinline__ void next() {
    if (++slot_ < kStages) return;
    slot_ = 0;
    parity_ ^= 1;
  }

 private:
  __device__ __forceinline__ uint32_t barriers() const { return stages_ + kStages * kStageBytes; }

  const uint32_t stages_;
  int slot_ = 0, parity_ = 0;
};

// The ring in this thread block's shared memory, its barriers initialized.
__device__ __forceinline__ Ring make_ring(const unsigned char* unaligned) {
  const uint32_t address = shared_address(unaligned);
  const Ring ring(address + (-address & 1023));
  if (threadIdx.x == 0) ring.init();
  cluster_barrier(kCluster);
  return ring;
}

// The same in all lanes, as the compiler learns from this.
__device__ __forceinline__ int uniform_warp() {
  return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0);
}

// Registers move from the warpgroup that copies to those that multiply.
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
}
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
}

__device__ __forceinline__ void multipliers_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory");
}

// d += a b over a stage's 64 depths, 64 rows and kN columns.
template <int kN, bool kTurned>
__device__ __forceinline__ void multiply_stage(float* d, uint32_t a, uint32_t b) {
  const uint32_t left = wgmma_operand(a);
  const uint32_t right = kTurned ? turned_wgmma_operand(b) : wgmma_operand(b);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    SharedWgmma<kN, kTurned>::run(d, left + k * 2, right + k * (kTurned ? 128 : 2));
}

// Frees a stage in both thread blocks.
__device__ __forceinline__ void release(uint32_t empty) {
  const int lane = threadIdx.x % kWarpSize;
  if (lane < kCluster) arrive_at(address_in(empty, lane));
}

// d += a b over the ring's next stages: a from byte `a_at` of a stage, b from byte `b_at` of it.
// `before(stage)` may still change a stage that has come. The last `held` stages are not freed.
template <int kN, bool kTurned, typename Before>
__device__ __forceinline__ void multiply_stages(float (&d)[kSide * 32], Ring& ring, int stages,
                                                int held, int a_at, int b_at,
                                                const Before& before) {
  uint32_t previous = 0;
  fence_operands(d);
  for (int stage = 0; stage < stages; ++stage) {
    wait_for(ring.full(), ring.parity());
    before(stage, ring.stage());
    wgmma_fence();
    multiply_stage<kN, kTurned>(d, ring.stage() + a_at, ring.stage() + b_at);
    wgmma_commit();
    if (stage > 0) {
      wgmma_wait<1>();
      if (stage <= stages - held) release(previous);
    }
    previous = ring.empty();
    ring.next();
  }
  wgmma_wait();
  fence_operands(d);
  if (stages > 0 && held == 0) release(previous);
}

// Of a warpgroup that has nothing to multiply.
__device__ __forceinline__ void skip_stages(Ring& ring, int stages) {
  for (int stage = 0; stage < stages; ++stage, ring.next()) {
    wait_for(ring.full(), ring.parity());
    release(ring.empty());
  }
}

#endif

}  // namespace grace::cka::warpgroup
