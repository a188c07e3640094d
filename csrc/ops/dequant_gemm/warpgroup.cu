// dequant_gemm for many rows of x by wgmma, sm_90a.
//
// A block computes 64 rows of the weight for each of its warpgroups, times `kTokens` rows of x. The
// weight is operand A: a lane's codes become its registers of A, each code times its scale rounded
// once to x's dtype. x is operand B, from shared memory. One more warp keeps a ring of stages full
// by the copy engine: x, codes and scales of one or two tiles of K.
//
// Where there are fewer tiles of output than multiprocessors, a cluster of blocks splits K and adds
// up in one order. The order of every sum depends on the variant and on K alone.
#include "ops/dequant_gemm/plans.h"

#if defined(GRACE_WITH_SM90A) && !defined(GRACE_EMULATE)
#include <algorithm>

#include "common/bulk_copy.h"
#include "common/cluster.h"
#include "common/wgmma.h"
#include "ops/dequant_gemm/tensor_core.h"

namespace grace::dequant_gemm {
namespace {

constexpr int kGroupThreads = 4 * kWarpSize;  // of a warpgroup
constexpr int kMostStages = 24;
constexpr int kStored = 32;  // rows of x that leave together
constexpr int kBarrierBytes = 1024;
static_assert(2 * kMostStages * 8 <= kBarrierBytes);

template <int kTokens_, int kGroups_>
struct Shape {
  static constexpr int kTokens = kTokens_;  // rows of x
  static constexpr int kGroups = kGroups_;  // warpgroups that multiply
  static constexpr int kMultipliers = kGroups * kGroupThreads;
  static constexpr int kThreads = kMultipliers + kGroupThreads;  // one more warpgroup copies
  // With many sums the warps that multiply take registers over from those that copy.
  static constexpr bool kTakesRegisters = kTokens * kGroups > 384;
  static constexpr int kFragments = kTokens / 8;              // of sums, of a warp
  static constexpr int kAllFragments = kFragments * kGroups;  // of the block's warps of one number
  static constexpr int kStageTiles = kTokens < 256 ? 2 : 1;   // of K
  static constexpr int kXBytes = kTokens * kTile * 2;         // of a tile of K
};

// A stage of the ring: x, codes [warpgroup][tile], scales [group of K][row].
template <int kBits, typename S>
struct Stage {
  static constexpr int kTileBytes = Layout<kBits>::kTileWords * 4;
  static constexpr int kCodes = S::kStageTiles * S::kXBytes;
  static constexpr int kScales = kCodes + S::kGroups * S::kStageTiles * kTileBytes;
  static constexpr int kScaleBytes = S::kGroups * kTile * 2;  // of a group of K
  static constexpr int kUsed = kScales + 2 * S::kStageTiles * kScaleBytes;
  static constexpr int kBytes = (kUsed + 1023) / 1024 * 1024;  // x is swizzled from such multiples
};

struct Work {
  int pairs;                   // of tiles of K, the last one filled up
  int row_tiles, token_tiles;  // of the output
  int cluster, stages;
  int stage_scales;   // groups of K in a stage
  int scales_stages;  // stages that one group of K, if it is larger, goes on for
  bool stores;        // the output can be written by the copy engine
};

struct Maps {
  CUtensorMap x, codes, scales, out;
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

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The ring of stages as a warp walks it: addresses in shared memory, and the parity of this round.
template <int kBits, typename S>
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
      init_barrier(barrier + kMostStages * 8, S::kMultipliers / kWarpSize);
    }
    fence_barriers();
  }

  __device__ __forceinline__ void next() {
    stage_ += Stage<kBits, S>::kBytes;
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

// --- the warp that copies
// -------------------------------------------------------------------------

template <int kBits, typename S>
class Copier {
 public:
  __device__ __forceinline__ Copier(const Maps& maps, const Work& work, const Ring<kBits, S>& ring,
                                    int first_pair, int last_pair)
      : maps_(maps),
        work_(work),
        ring_(ring),
        first_(first_pair * 2 / S::kStageTiles),
        last_(last_pair * 2 / S::kStageTiles),
        bytes_(Stage<kBits, S>::kScales + work.stage_scales * Stage<kBits, S>::kScaleBytes) {}

  __device__ __forceinline__ void run(int index, int step) {
    const int outputs = work_.row_tiles * work_.token_tiles;
    if (index >= outputs) return;
    // Weights are no kernel's output: their first copies start before the kernel ahead has ended.
    const Output first(work_, index);
    const int ahead = min(work_.stages, last_ - first_);
    Ring<kBits, S> early = ring_;
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

  __device__ __forceinline__ void weights(const Ring<kBits, S>& ring, const Output& output, int i,
                                          int scales_row) const {
    using Here = Stage<kBits, S>;
    const int first = output.row_tile * S::kGroups;
    warp_expect_bytes(ring.full(), bytes_);
    warp_copy_box_4d(ring.stage() + Here::kCodes, maps_.codes, i * S::kStageTiles, first,
                     ring.full());
    warp_copy_box(ring.stage() + Here::kScales, maps_.scales, first * kTile, scales_row,
                  ring.full());
  }

  __device__ __forceinline__ void x(const Output& output, int i) const {
#pragma unroll
    for (int j = 0; j < S::kStageTiles; ++j)
      warp_copy_box(ring_.stage() + j * S::kXBytes, maps_.x, (i * S::kStageTiles + j) * kTile,
                    output.token_tile * S::kTokens, ring_.full());
  }

  const Maps& maps_;
  const Work& work_;
  Ring<kBits, S> ring_;
  const int first_, last_, bytes_;
};

// --- the warps that multiply
// ----------------------------------------------------------------------

__device__ __forceinline__ void read_shared(uint32_t from, uint32_t (&v)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ uint32_t read_shared_half(uint32_t from) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from) : "memory");
  return v;
}

// Where a stage has the scales of its tiles and their halves, beside the first.
struct ScalePlaces {
  uint32_t tile, half;

  template <typename S>
  __device__ __forceinline__ static ScalePlaces of(const Work& work) {
    constexpr uint32_t kBytes = S::kGroups * kTile * 2;
    const int per_tile = work.stage_scales / S::kStageTiles;  // 0, 1 or 2
    return {per_tile * kBytes, per_tile > 1 ? kBytes : 0};
  }
};

// A warp's 16 rows of a tile of K as they came, and as operand A of four products.
template <int kBits, typename S, typename T>
class Codes {
 public:
  __device__ __forceinline__ explicit Codes(const Work& work) : places_(ScalePlaces::of<S>(work)) {
    using Here = Stage<kBits, S>;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    words_place_ = Here::kCodes + warp / 4 * S::kStageTiles * Here::kTileBytes +
                   warp % 4 * Layout<kBits>::kBandWords * 4 + lane * 16;
    scales_place_ = Here::kScales + (warp * kBand + lane / 4) * 2;
  }

  template <int kStageTile>
  __device__ __forceinline__ void read(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i)
      read_shared(
          stage + words_place_ + kStageTile * Stage<kBits, S>::kTileBytes + i * kWarpSize * 16,
          words_[i]);
    scales_ = stage + scales_place_ + kStageTile * places_.tile;
    low_ = read_shared_half(scales_);
    high_ = read_shared_half(scales_ + 16);
  }

  __device__ __forceinline__ void decode(uint32_t (&a)[16]) const {
    RowScale<kBits, T> rows[2];
    rows[0].set(low_);
    rows[1].set(high_);
#pragma unroll
    for (int block = 0; block < kBlocksPerTile; ++block) {
      if (block == kBlocksPerTile / 2 && places_.half != 0) {
        rows[0].set(read_shared_half(scales_ + places_.half));
        rows[1].set(read_shared_half(scales_ + places_.half + 16));
      }
      constexpr int kWords = Layout<kBits>::kBlockWords;
      uint32_t words[kWords], four[4];
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        words[i] = words_[(block * kWords + i) / 4][(block * kWords + i) % 4];
      decode_weights<kBits, T>(words, rows, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[block * 4 + i] = four[i];
    }
  }

 private:
  const ScalePlaces places_;
  uint32_t words_place_, scales_place_;
  uint32_t words_[kBits / 4][4];
  uint32_t scales_, low_, high_;
};

template <int kBits, typename S, typename T>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const Ring<kBits, S>& ring, const Work& work)
      : ring_(ring), codes_(work) {}

  // The sums of `pairs` pairs of tiles of K, from the ring's next stages. While the products of one
  // tile run, the weights of the next one are made, and the codes of the one after it are read.
  __device__ __forceinline__ void run(int pairs, float (&sums)[S::kTokens / 2]) {
    uint32_t even[16], odd[16];
    uint32_t used = 0;
    enter();
    for (int left = pairs; left > 0; --left) {
      codes_.decode(even);
      const uint32_t even_x = ring_.stage(), even_empty = ring_.empty();
      if constexpr (S::kStageTiles == 1) {
        ring_.next();
        enter();
      } else {
        codes_.template read<S::kStageTiles - 1>(ring_.stage());
      }
      multiply(sums, even, even_x, left < pairs);
      wgmma_wait<1>();
      fence_operands(odd);
      if (left < pairs) release(used);

      codes_.decode(odd);
      const uint32_t odd_x = ring_.stage() + (S::kStageTiles - 1) * S::kXBytes;
      used = ring_.empty();
      ring_.next();
      if (left > 1) enter();
      multiply(sums, odd, odd_x, true);
      wgmma_wait<1>();
      fence_operands(even);
      if (S::kStageTiles == 1) release(even_empty);
    }
    wgmma_wait<0>();
    fence_operands(odd);
    fence_operands(sums);
    release(used);
  }

 private:
  __device__ __forceinline__ void enter() {
    wait_for(ring_.full(), ring_.parity());
    codes_.template read<0>(ring_.stage());
  }

  __device__ __forceinline__ void multiply(float (&sums)[S::kTokens / 2], uint32_t (&a)[16],
                                           uint32_t x, bool add) {
    const uint32_t operand = wgmma_operand(x);
    fence_operands(a);
    fence_operands(sums);
    wgmma_fence();
#pragma unroll
    for (int block = 0; block < kBlocksPerTile; ++block)
      wgmma<T, S::kTokens>(sums, a + block * 4, operand + block * 2, block > 0 || add);
    wgmma_commit();
  }

  __device__ __forceinline__ void release(uint32_t empty) const {
    if (threadIdx.x % kWarpSize == 0) arrive(empty);
  }

  Ring<kBits, S> ring_;
  Codes<kBits, S, T> codes_;
};

// --- the end of a tile of output
// ------------------------------------------------------------------

__device__ __forceinline__ void group_barrier() {
  asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.x / kGroupThreads + 1), "n"(kGroupThreads)
               : "memory");
}

template <typename T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

// Writes a warpgroup's tile of the output, kStored rows of x at a time: bias, SwiGLU, residual and
// the one rounding as the sums lie, then turned round into one of two buffers and away.
template <typename S, typename T>
class Writer {
 public:
  static constexpr int kBufferBytes = kStored * kTile * 2;

  __device__ __forceinline__ Writer(const Call<T>& call, const CUtensorMap& out, uint32_t buffers)
      : call_(call),
        out_(out),
        buffers_(buffers + threadIdx.x / kGroupThreads * 2 * kBufferBytes) {}

  __device__ __forceinline__ void write(const Output& output, float (&sums)[S::kTokens / 2],
                                        float fraction) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t tile_row = (int64_t{output.row_tile} * S::kGroups + warp / 4) * kTile;
    const int64_t row = tile_row + warp % 4 * kBand + lane / 4;
    const float low = call_.biased(0.0f, row), high = call_.biased(0.0f, row + 8);
#pragma unroll
    for (int i = 0; i < S::kTokens / 2; ++i)
      sums[i] = sums[i] * fraction + (i % 4 < 2 ? low : high);
    const int m = output.token_tile * S::kTokens;
#pragma unroll
    for (int first = 0; first < S::kTokens; first += kStored) {
      if (m + first >= call_.problem.m) break;
      const uint32_t buffer = buffers_ + turn_++ % 2 * kBufferBytes;
      // The store before the last one was from this buffer.
      if (threadIdx.x % kGroupThreads == 0) wait_for_stores<1>();
      group_barrier();
      constexpr int kSums = (kStored < S::kTokens ? kStored : S::kTokens) / 2;
      float part[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) part[i] = sums[first / 2 + i];
      if (call_.swiglu) {
        turn_swiglu(part, row, m + first, buffer);
      } else {
        turn(part, row, m + first, buffer);
      }
      fence_for_stores();
      group_barrier();
      if (threadIdx.x % kGroupThreads == 0) {
        store_box(buffer, out_, static_cast<int>(call_.swiglu ? tile_row / 2 : tile_row),
                  m + first);
        commit_stores();
      }
    }
  }

  // Before the block ends: its shared memory has been read.
  __device__ __forceinline__ void finish() const {
    if (threadIdx.x % kGroupThreads == 0) wait_for_stores<0>();
  }

 private:
  // Two sums of neighbouring rows of x, with their residual.
  __device__ __forceinline__ uint32_t pair(float a, float b, int64_t column, int m) const {
    if (call_.residual != nullptr && column < call_.columns()) {
      const T* const at = call_.residual + int64_t{m} * call_.columns() + column;
      if (m < call_.problem.m) a += to_float(at[0]);
      if (m + 1 < call_.problem.m) b += to_float(at[call_.columns()]);
    }
    return rounded_pair<T>(a, b);
  }

  template <int kSums>
  __device__ __forceinline__ void turn(const float (&v)[kSums], int64_t row, int m,
                                       uint32_t buffer) const {
    const int lane = threadIdx.x % kWarpSize, band = threadIdx.x / kWarpSize % 4;
    const int token = lane / 16 * 8 + lane % 8, chunk = band * 2 + lane / 8 % 2;
#pragma unroll
    for (int f = 0; f < kSums / 4; f += 2) {
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out[i] = pair(v[(f + i / 2) * 4 + i % 2 * 2], v[(f + i / 2) * 4 + i % 2 * 2 + 1],
                      row + i % 2 * 8, m + (f + i / 2) * 8 + lane % 4 * 2);
      // Rows of 128 bytes, swizzled as the map has it.
      store_turned(buffer + (f * 8 + token) * 128 + (chunk ^ token % 8) * 16, out);
    }
  }

  template <int kSums>
  __device__ __forceinline__ void turn_swiglu(const float (&v)[kSums], int64_t row, int m,
                                              uint32_t buffer) const {
    const int lane = threadIdx.x % kWarpSize, band = threadIdx.x / kWarpSize % 4;
    const int64_t column = swiglu_column(row);
#pragma unroll
    for (int f = 0; f < kSums / 4; f += 4) {
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (f + i) % (kSums / 4) * 4;
        out[i] = pair(swiglu(v[at], v[at + 2]), swiglu(v[at + 1], v[at + 3]), column,
                      m + (f + i) * 8 + lane % 4 * 2);
      }
      // Rows of 64 bytes. With 16 rows of x the second half of the buffer is not stored.
      const int token = f * 8 + lane;
      store_turned(buffer + token * 64 + (band ^ token / 2 % 4) * 16, out);
    }
  }

  const Call<T>& call_;
  const CUtensorMap& out_;
  const uint32_t buffers_;
  uint32_t turn_ = 0;
};

template <typename S, typename T>
__device__ __forceinline__ void write_fragments(const Call<T>& call, const Output& output,
                                                const float (&sums)[S::kTokens / 2],
                                                float fraction) {
  const int warp = threadIdx.x / kWarpSize;
  const int64_t row = (int64_t{output.row_tile} * S::kGroups + warp / 4) * kTile + warp % 4 * kBand;
#pragma unroll
  for (int f = 0; f < S::kFragments; ++f) {
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = sums[f * 4 + i] * fraction;
    write_fragment(call, row, int64_t{output.token_tile} * S::kTokens + f * 8, sum);
  }
}

// Fragment f of the block is added up in block f % cluster, in the order of the blocks:
// [f / cluster][block of the cluster][thread of a warpgroup]
template <typename S>
__device__ __forceinline__ void share_sums(const float (&sums)[S::kTokens / 2], int cluster,
                                           int rank, float4* shared) {
  const int first = static_cast<int>(threadIdx.x) / kGroupThreads * S::kFragments;
#pragma unroll
  for (int i = 0; i < S::kFragments; ++i) {
    const int f = first + i;
    const float4* const place =
        shared + (f / cluster * cluster + rank) * kGroupThreads + threadIdx.x % kGroupThreads;
    asm volatile(
        "st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address_in(place, f % cluster)),
        "f"(sums[4 * i]), "f"(sums[4 * i + 1]), "f"(sums[4 * i + 2]), "f"(sums[4 * i + 3])
        : "memory");
  }
}

template <typename S, typename T>
__device__ __forceinline__ void write_shared(const Call<T>& call, const Output& output, int cluster,
                                             int rank, float fraction, const float4* shared) {
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  for (int i = group; i * cluster + rank < S::kAllFragments; i += S::kGroups) {
    float sum[4] = {};
    for (int source = 0; source < cluster; ++source) {
      const float4 v = shared[(i * cluster + source) * kGroupThreads + threadIdx.x % kGroupThreads];
      sum[0] += v.x;
      sum[1] += v.y;
      sum[2] += v.z;
      sum[3] += v.w;
    }
#pragma unroll
    for (float& v : sum) v *= fraction;
    const int f = i * cluster + rank;
    const int64_t row = (int64_t{output.row_tile} * S::kGroups + f / S::kFragments) * kTile +
                        threadIdx.x / kWarpSize % 4 * kBand;
    write_fragment(call, row, int64_t{output.token_tile} * S::kTokens + f % S::kFragments * 8, sum);
  }
}

#endif

template <int kBits, typename S, typename T>
__global__ void __launch_bounds__(S::kThreads, 1)
    warpgroup_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Call<T> call,
                     const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  GRACE_DYNAMIC_SHARED(unaligned);
  unsigned char* const barriers = unaligned + (-shared_address(unaligned) & 1023);
  unsigned char* const shared = barriers + kBarrierBytes;
  unsigned char* const after = shared + work.stages * Stage<kBits, S>::kBytes;
  auto* const sums_place = reinterpret_cast<float4*>(after);  // of a cluster
  const Ring<kBits, S> ring(shared_address(shared), shared_address(barriers), work.stages);
  const int rank = static_cast<int>(cluster_rank());
  const int first = work.pairs * rank / work.cluster;
  const int last = work.pairs * (rank + 1) / work.cluster;
  const int step = static_cast<int>(gridDim.x) / work.cluster;
  int index = static_cast<int>(blockIdx.x) / work.cluster;

  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  if (work.cluster > 1) cluster_arrive();  // this block runs

  if (threadIdx.x >= S::kMultipliers) {
    if constexpr (S::kTakesRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x / kWarpSize == S::kMultipliers / kWarpSize)
      Copier<kBits, S>(maps, work, ring, first, last).run(index, step);
    if (work.cluster > 1) {
      cluster_wait();
      cluster_barrier(work.cluster);
    }
    return;
  }

  if constexpr (S::kTakesRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  wait_for_previous_kernel();
  constexpr float kFraction = 1.0f / RowScale<kBits, T>::kFraction;
  Multiplier<kBits, S, T> multiplier(ring, work);
  Writer<S, T> writer(call, maps.out, shared_address(after));
  for (; index < work.row_tiles * work.token_tiles; index += step) {
    const Output output(work, index);
    float sums[S::kTokens / 2];
    multiplier.run(last - first, sums);
    if (work.cluster > 1) {
      cluster_wait();
      share_sums<S>(sums, work.cluster, rank, sums_place);
      cluster_barrier(work.cluster);
      write_shared<S>(call, output, work.cluster, rank, kFraction, sums_place);
    } else if (work.stores) {
      writer.write(output, sums, kFraction);
    } else {
      write_fragments<S>(call, output, sums, kFraction);
    }
  }
  writer.finish();
#endif
}

// --- variants
// -------------------------------------------------------------------------------------

// Calls f(shape, cluster) with what a variant's number stands for: 8 * shape + cluster - 1.
template <typename F>
bool with_variant(int variant, F&& f) {
  const int cluster = variant % 8 + 1;
  switch (variant / 8) {
    case 0:
      return f(Shape<16, 2>{}, cluster);
    case 1:
      return f(Shape<16, 3>{}, cluster);
    case 2:
      return f(Shape<16, 4>{}, cluster);
    case 3:
      return f(Shape<32, 2>{}, cluster);
    case 4:
      return f(Shape<32, 3>{}, cluster);
    case 5:
      return f(Shape<32, 4>{}, cluster);
    case 6:
      return f(Shape<64, 2>{}, cluster);
    case 7:
      return f(Shape<64, 3>{}, cluster);
    case 8:
      return f(Shape<64, 4>{}, cluster);
    case 9:
      return f(Shape<128, 2>{}, cluster);
    case 10:
      return f(Shape<128, 3>{}, cluster);
    case 11:
      return f(Shape<192, 2>{}, cluster);
    case 12:
      return f(Shape<256, 2>{}, cluster);
    default:
      return false;
  }
}
constexpr int kVariants = 13 * 8;

// Of shared memory, beside the stages: alignment, barriers, and where sums meet or leave from.
template <typename S>
int fixed_bytes(int cluster) {
  const int met = ceil_div(S::kAllFragments, cluster) * cluster * kGroupThreads * 16;
  const int leaving = S::kGroups * 2 * kStored * kTile * 2;
  return 1024 + kBarrierBytes + (cluster > 1 ? met : leaving);
}

template <int kBits, typename S>
int stages_of(int cluster, const Device& device) {
  return std::min(kMostStages,
                  (device.shared_bytes - fixed_bytes<S>(cluster)) / Stage<kBits, S>::kBytes);
}

template <int kBits, typename S, typename T>
bool fits(const Call<T>& call, int cluster, const Device& device) {
  const Problem& p = call.problem;
  const int64_t tokens = ceil_div<int64_t>(p.m, S::kTokens) * S::kTokens;
  const bool groups =
      p.group_size < 2 * kTile || p.group_size % (2 * kTile) == 0 || p.groups() == 1;
  return device.capability == 90 && readable(call) && groups &&
         call.scales.is_bf16 == std::is_same_v<T, bf16> && p.k_tiles >= 2 * cluster &&
         stages_of<kBits, S>(cluster, device) >= 3 && p.m < 1 << 30 &&
         (p.m + 7) / 8 * 8 * 2 > tokens;
}

template <int kBits, typename S, typename T>
Maps maps_of(const Call<T>& call, const Work& work) {
  const Problem& p = call.problem;
  const auto u = [](auto v) { return static_cast<cuuint64_t>(v); };
  constexpr auto kType =
      std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  constexpr cuuint32_t kRow = 256, kRows = Layout<kBits>::kTileWords / 256;  // words of a tile
  constexpr cuuint64_t kTileBytes = Layout<kBits>::kTileWords * 4;
  constexpr cuuint32_t kOutRows = kStored < S::kTokens ? kStored : S::kTokens;
  const cuuint64_t columns = u(call.columns());
  const cuuint32_t width = call.swiglu ? kTile / 2 : kTile;
  Maps maps = {};
  maps.x = tensor_map<2>({kType,
                          call.x,
                          {u(p.k), u(p.m)},
                          {u(p.k) * 2},
                          {kTile, S::kTokens},
                          CU_TENSOR_MAP_SWIZZLE_128B});
  maps.codes = tensor_map<4>({CU_TENSOR_MAP_DATA_TYPE_UINT32,
                              call.qweight,
                              {kRow, kRows, u(p.k_tiles), u(p.n_tiles)},
                              {kRow * 4, kTileBytes, u(p.k_tiles) * kTileBytes},
                              {kRow, kRows, S::kStageTiles, S::kGroups},
                              CU_TENSOR_MAP_SWIZZLE_NONE});
  maps.scales = tensor_map<2>({kType,
                               call.scales.data,
                               {u(call.scales.stride), u(p.groups())},
                               {u(call.scales.stride) * 2},
                               {S::kGroups * kTile, static_cast<cuuint32_t>(work.stage_scales)},
                               CU_TENSOR_MAP_SWIZZLE_NONE});
  if (work.stores)
    maps.out =
        tensor_map<2>({kType,
                       call.out,
                       {columns, u(p.m)},
                       {columns * 2},
                       {width, kOutRows},
                       call.swiglu ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B});
  return maps;
}

template <int kBits, typename S, typename T>
void launch_warpgroup(const Call<T>& call, int cluster, int device_index) {
  const Device& device = Device::of(device_index);
  const Problem& p = call.problem;
  const auto i = [](int64_t x) { return static_cast<int>(x); };
  constexpr int kStageColumns = S::kStageTiles * kTile;
  Work work = {};
  work.pairs = i(ceil_div<int64_t>(p.k_tiles, 2));
  work.row_tiles = i(ceil_div<int64_t>(p.n_tiles, S::kGroups));
  work.token_tiles = i(ceil_div<int64_t>(p.m, S::kTokens));
  work.cluster = cluster;
  work.stages = stages_of<kBits, S>(cluster, device);
  work.stage_scales = p.group_size < kStageColumns ? kStageColumns / i(p.group_size) : 1;
  if (p.groups() == 1) work.stage_scales = 1;
  work.scales_stages = i(std::max<int64_t>(1, ceil_div<int64_t>(p.group_size, kStageColumns)));
  work.stores = call.columns() % 8 == 0 && reinterpret_cast<uintptr_t>(call.out) % 16 == 0;
  const int outputs = work.row_tiles * work.token_tiles;
  const auto clusters =
      static_cast<unsigned>(cluster > 1 ? outputs : std::min(outputs, device.processors));
  LaunchShape shape{
      clusters * cluster, S::kThreads,
      static_cast<size_t>(fixed_bytes<S>(cluster) + work.stages * Stage<kBits, S>::kBytes)};
  shape.dependent = true;
  shape.cluster = static_cast<unsigned>(cluster);
  launch(warpgroup_kernel<kBits, S, T>, shape, device_index, maps_of<kBits, S>(call, work), call,
         work);
}

}  // namespace

int warpgroup_variants() { return kVariants; }

template <int kBits, typename T>
bool warpgroup_runs(const Call<T>& call, int variant, int device) {
  return with_variant(variant, [&](auto shape, int cluster) {
    return fits<kBits, decltype(shape)>(call, cluster, Device::of(device));
  });
}

template <int kBits, typename T>
void warpgroup(const Call<T>& call, int variant, int device) {
  with_variant(variant, [&](auto shape, int cluster) {
    launch_warpgroup<kBits, decltype(shape)>(call, cluster, device);
    return true;
  });
}

}  // namespace grace::dequant_gemm

#else

namespace grace::dequant_gemm {

int warpgroup_variants() { return 0; }

template <int kBits, typename T>
bool warpgroup_runs(const Call<T>&, int, int) {
  return false;
}

template <int kBits, typename T>
void warpgroup(const Call<T>&, int, int) {}

}  // namespace grace::dequant_gemm

#endif

namespace grace::dequant_gemm {

#define GRACE_INSTANTIATE(bits, T)                              \
  template bool warpgroup_runs<bits>(const Call<T>&, int, int); \
  template void warpgroup<bits>(const Call<T>&, int, int);
GRACE_INSTANTIATE(4, bf16)
GRACE_INSTANTIATE(4, fp16)
GRACE_INSTANTIATE(8, bf16)
GRACE_INSTANTIATE(8, fp16)
#undef GRACE_INSTANTIATE

}  // namespace grace::dequant_gemm
