// dequant_gemm with weights and x by way of a ring of stages, sm_90a. warpgroup_w4.cu and
// warpgroup_w8.cu compile it, side by side.
//
// A block computes 64 rows of the weight for each of its warpgroups, times `kTokens` rows of x. The
// weight is operand A: a lane's codes become its registers of A, each code times its scale rounded
// once to x's dtype. x is operand B: of wgmma, from shared memory; or of mma.sync up to 16 rows,
// where a wgmma takes as long as one of more rows. One more warp keeps a ring of stages full
// by the copy engine: x, codes and scales of one or two tiles of K.
//
// Where there are fewer tiles of output than multiprocessors, a cluster of blocks splits K and adds
// up in one order. The order of every sum depends on the variant and on K alone.
#pragma once

#include "ops/dequant_gemm/plans.h"

#if defined(GRACE_WITH_SM90A) && !defined(GRACE_EMULATE)
#include <algorithm>

#include "common/bulk_copy.h"
#include "common/cluster.h"
#include "common/mma.h"
#include "common/wgmma.h"
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

// --- the warps that multiply ---------------------------------------------------------------------

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

__device__ __forceinline__ void write_shared(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

template <typename T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

// A warp's 16 rows of a tile of K: as they came, and as operand A of four products.
template <typename K>
class Codes {
  using S = typename K::S;
  using T = typename K::T;
  static constexpr int kBits = K::kBits;

 public:
  __device__ __forceinline__ explicit Codes(const Work& work) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    words_place_ = K::kCodes + warp / 4 * S::kStageTiles * K::kTileBytes +
                   warp % 4 * Layout<kBits>::kBandWords * 4 + lane * 16;
    scales_place_ = K::kScales + (warp * kBand + lane / 4) * 2;
    if constexpr (!K::kWide) {
      const int per_tile = work.stage_scales / S::kStageTiles;  // 0, 1 or 2
      next_tile_ = per_tile * K::kScaleBytes;
      next_half_ = per_tile > 1 ? K::kScaleBytes : 0;
    }
  }

  template <int kStageTile>
  __device__ __forceinline__ void read(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i)
      read_shared(stage + words_place_ + kStageTile * K::kTileBytes + i * kWarpSize * 16,
                  words_[i]);
    if constexpr (!K::kWide || kStageTile == 0) {
      scales_ = stage + scales_place_ + (K::kWide ? 0 : kStageTile * next_tile_);
      low_ = read_shared_half(scales_);
      high_ = read_shared_half(scales_ + 16);
    }
  }

  // Half a tile: two blocks of 16 columns.
  template <int kStageTile, int kHalf>
  __device__ __forceinline__ void decode(uint32_t (&a)[8]) {
    if constexpr (kHalf == 0 && (!K::kWide || kStageTile == 0)) {
      rows_[0].set(low_);
      rows_[1].set(high_);
    }
    if constexpr (kHalf == 1 && !K::kWide) {
      if (next_half_ != 0) {
        rows_[0].set(read_shared_half(scales_ + next_half_));
        rows_[1].set(read_shared_half(scales_ + next_half_ + 16));
      }
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      constexpr int kWords = Layout<kBits>::kBlockWords;
      uint32_t words[kWords], four[4];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int at = (kHalf * 2 + block) * kWords + i;
        words[i] = words_[at / 4][at % 4];
      }
      decode_weights<kBits, T>(words, rows_, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[block * 4 + i] = four[i];
    }
  }

 private:
  uint32_t words_place_, scales_place_, next_tile_ = 0, next_half_ = 0;
  uint32_t words_[kBits / 4][4];
  uint32_t scales_, low_, high_;
  RowScale<kBits, T> rows_[2];
};

template <typename K>
class WgmmaMultiplier {
  using S = typename K::S;
  using T = typename K::T;
  using Sums = float[S::kSums];

 public:
  __device__ __forceinline__ WgmmaMultiplier(const Ring<K>& ring, const Work& work)
      : ring_(ring), codes_(work) {}

  // Adds the products of `pairs` pairs of tiles of K, from the ring's next stages.
  __device__ __forceinline__ void run(int pairs, Sums& sums) {
    uint32_t first[8], second[8];
    enter();
    for (int left = pairs; left > 0; --left) {
      tile<0>(first, second, sums, left < pairs, true);
      tile<1>(first, second, sums, true, left > 1);
    }
    wgmma_wait<0>();
    fence_operands(sums);
    release(used_);
  }

 private:
  // While the products of half a tile run, the weights of the next half are made.
  template <int kParity>
  __device__ __forceinline__ void tile(uint32_t (&first)[8], uint32_t (&second)[8], Sums& sums,
                                       bool releases, bool enters) {
    constexpr bool kOneTile = S::kStageTiles == 1;
    constexpr int kStageTile = kOneTile ? 0 : kParity;
    const uint32_t x = wgmma_operand(ring_.stage() + kStageTile * S::kXBytes);
    codes_.template decode<kStageTile, 0>(first);
    multiply(sums, first, x);
    wgmma_wait<1>();
    if ((kParity == 0 || kOneTile) && releases) release(used_);
    codes_.template decode<kStageTile, 1>(second);
    if constexpr (kParity == 1 || kOneTile) {
      used_ = ring_.empty();
      ring_.next();
      if (enters) enter();
    } else {
      codes_.template read<1 - kOneTile>(ring_.stage());
    }
    multiply(sums, second, x + 4);
    wgmma_wait<1>();
  }

  __device__ __forceinline__ void enter() {
    wait_for(ring_.full(), ring_.parity());
    codes_.template read<0>(ring_.stage());
  }

  __device__ __forceinline__ void multiply(Sums& sums, const uint32_t (&a)[8], uint32_t x) {
    wgmma_fence();
    wgmma<T, S::kTokens>(sums, a, x);
    wgmma<T, S::kTokens>(sums, a + 4, x + 2);
    wgmma_commit();
  }

  __device__ __forceinline__ void release(uint32_t empty) const {
    if (threadIdx.x % kWarpSize == 0) arrive(empty);
  }

  Ring<K> ring_;
  Codes<K> codes_;
  uint32_t used_ = 0;  // the barrier of the stage that was left last
};

// The same with mma.sync.
template <typename K>
class MmaMultiplier {
  using S = typename K::S;
  using T = typename K::T;
  using Sums = float[S::kSums];
  static constexpr int kColumns = S::kTokens / 8;  // fragments of x side by side

 public:
  __device__ __forceinline__ MmaMultiplier(const Ring<K>& ring, const Work& work)
      : ring_(ring), codes_(work) {
    const int lane = threadIdx.x % kWarpSize;
    x_place_ = lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;  // chunk lane / 8 of row lane % 8
  }

  __device__ __forceinline__ void run(int pairs, Sums& sums) {
    enter();
    for (int left = pairs; left > 0; --left) {
      tile<0>(sums, true);
      tile<1>(sums, left > 1);
    }
    if constexpr (kColumns == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i] += sums[i + 4];
        sums[i + 4] = 0.0f;
      }
    }
  }

 private:
  template <int kParity>
  __device__ __forceinline__ void tile(Sums& sums, bool enters) {
    uint32_t x[kColumns][2][4], first[8], second[8];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const uint32_t from = ring_.stage() + kParity * S::kXBytes + j * 1024 + x_place_;
      load_matrices(from, x[j][0]);
      load_matrices(from ^ 64, x[j][1]);  // chunks 4 to 7
    }
    codes_.template decode<kParity, 0>(first);
    codes_.template decode<kParity, 1>(second);
    if constexpr (kParity == 0) {
      codes_.template read<1>(ring_.stage());
      multiply(sums, first, x, 0);
      multiply(sums, second, x, 1);
    } else {
      const uint32_t used = ring_.empty();
      ring_.next();
      if (enters) enter();
      multiply(sums, first, x, 0);
      multiply(sums, second, x, 1);
      __syncwarp();
      if (threadIdx.x % kWarpSize == 0) arrive(used);
    }
  }

  __device__ __forceinline__ void enter() {
    wait_for(ring_.full(), ring_.parity());
    codes_.template read<0>(ring_.stage());
  }

  // Two blocks of 16 columns; with one fragment of x each has its sums.
  __device__ __forceinline__ void multiply(Sums& sums, const uint32_t (&a)[8],
                                           const uint32_t (&x)[kColumns][2][4], int half) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const uint32_t four[4] = {a[block * 4], a[block * 4 + 1], a[block * 4 + 2],
                                  a[block * 4 + 3]};
        const uint32_t two[2] = {x[j][half][block * 2], x[j][half][block * 2 + 1]};
        float (&d)[4] = reinterpret_cast<float (&)[4]>(sums[(kColumns == 1 ? block : j) * 4]);
        mma_m16n8k16<T>(d, four, two);
      }
    }
  }

  Ring<K> ring_;
  Codes<K> codes_;
  uint32_t x_place_;
};

template <typename K>
using Multiplier = std::conditional_t<K::S::kWgmma, WgmmaMultiplier<K>, MmaMultiplier<K>>;

// --- the end of a tile of output -----------------------------------------------------------------

// Writes a warp's 16 rows of the weight's output, `kLeaving` rows of x at a time: bias, SwiGLU,
// residual and the one rounding as the sums lie, then turned round in a buffer of the warp's own,
// so that a lane has eight neighbours of a row of the output.
template <typename S, typename T>
class Writer {
 public:
  static constexpr int kLeaving = S::kTokens % 32 == 0 ? 32 : 16;
  static_assert(S::kSums * 2 % kLeaving == 0);
  static constexpr int kBufferBytes = 32 * kBand * 2;

  __device__ __forceinline__ Writer(const Call<T>& call, uint32_t buffers)
      : call_(call), buffer_(buffers + threadIdx.x / kWarpSize * kBufferBytes) {}

  __device__ __forceinline__ void write(const Output& output, float (&sums)[S::kSums],
                                        float fraction) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t band = int64_t{output.row_tile} * S::kGroups * kTile + warp * kBand;
    const int64_t row = band + lane / 4;
    const float low = call_.biased(0.0f, row), high = call_.biased(0.0f, row + 8);
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) sums[i] = sums[i] * fraction + (i % 4 < 2 ? low : high);
    if (call_.swiglu) {
#pragma unroll
      for (int i = 0; i < S::kSums; i += 4) {
        sums[i] = swiglu(sums[i], sums[i + 2]);
        sums[i + 1] = swiglu(sums[i + 1], sums[i + 3]);
      }
    }
    const int64_t column = call_.swiglu ? band / 2 : band;
    const int chunks = call_.swiglu ? 1 : 2;  // of 8 columns
#pragma unroll
    for (int first = 0; first < S::kTokens; first += kLeaving) {
      const int64_t m = int64_t{output.token_tile} * S::kTokens + first;
      if (m >= call_.problem.m) break;
      float* const part = sums + first / 2;
      if (call_.residual != nullptr) {
        read_residual(m, column, chunks);
        add_residual(part);
      }
      turn(part);
      write_rows(m, column, chunks);
    }
  }

 private:
  // A chunk of 8 columns of a row of x in the buffer: no two of a quarter warp's in one bank.
  __device__ __forceinline__ uint32_t place(int token, int chunk) const {
    return buffer_ + token * kBand * 2 + (chunk ^ token / 4 % 2) * 16;
  }

  // This lane's chunk for turning fragments f and f + 1 round.
  __device__ __forceinline__ uint32_t turned_place(int f) const {
    const int lane = threadIdx.x % kWarpSize;
    return place(f * 8 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }

  __device__ __forceinline__ void turn(const float* v) const {
#pragma unroll
    for (int f = 0; f < kLeaving / 8; f += 2) {
      uint32_t four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = rounded_pair<T>(v[f * 4 + i * 2], v[f * 4 + i * 2 + 1]);
      store_turned(turned_place(f), four);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void add_residual(float* v) const {
#pragma unroll
    for (int f = 0; f < kLeaving / 8; f += 2) {
      uint32_t four[4];
      load_turned(turned_place(f), four);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[f * 4 + i * 2] += to_float(T{static_cast<uint16_t>(four[i])});
        v[f * 4 + i * 2 + 1] += to_float(T{static_cast<uint16_t>(four[i] >> 16)});
      }
    }
    __syncwarp();
  }

  // Calls f(place, pointer offset, columns) for every chunk of this lane's.
  template <typename F>
  __device__ __forceinline__ void for_chunks(int64_t m, int64_t column, int chunks, F&& f) const {
    const int64_t columns = call_.columns();
    for (int i = threadIdx.x % kWarpSize; i < kLeaving * chunks; i += kWarpSize) {
      const int token = i / chunks, chunk = i % chunks;
      const int64_t left = columns - (column + chunk * 8);
      if (m + token < call_.problem.m && left > 0)
        f(place(token, chunk), (m + token) * columns + column + chunk * 8,
          left < 8 ? static_cast<int>(left) : 8);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void write_rows(int64_t m, int64_t column, int chunks) const {
    const bool whole = call_.columns() % 8 == 0;
    for_chunks(m, column, chunks, [&](uint32_t from, int64_t at, int columns) {
      uint32_t v[4];
      read_shared(from, v);
      if (whole) {
        *reinterpret_cast<uint4*>(call_.out + at) = make_uint4(v[0], v[1], v[2], v[3]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (i < columns) call_.out[at + i].bits = static_cast<uint16_t>(v[i / 2] >> (i % 2 * 16));
      }
    });
  }

  __device__ __forceinline__ void read_residual(int64_t m, int64_t column, int chunks) const {
    for_chunks(m, column, chunks, [&](uint32_t to, int64_t at, int columns) {
      uint32_t v[4] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < columns) v[i / 2] |= uint32_t{call_.residual[at + i].bits} << (i % 2 * 16);
      write_shared(to, v);
    });
  }

  const Call<T>& call_;
  const uint32_t buffer_;
};

// --- where the blocks of a cluster add up --------------------------------------------------------

// Fragment f of the block is added up in block f % cluster, in the order of the blocks:
// [f / cluster][block of the cluster][thread of a warpgroup], 16 bytes each.
template <typename S>
class Meeting {
 public:
  __device__ __forceinline__ Meeting(int cluster, uint32_t sums, uint32_t barrier)
      : cluster_(cluster),
        rank_(static_cast<int>(cluster_rank())),
        sums_(sums),
        barrier_(barrier) {}

  // By one thread, before the blocks of the cluster know of each other.
  __device__ __forceinline__ void init() const {
    init_barrier(barrier_, 1);
    fence_barriers();
    const int mine = (S::kAllFragments - rank_ + cluster_ - 1) / cluster_;
    expect_bytes(barrier_, mine * cluster_ * kGroupThreads * 16);
  }

  __device__ __forceinline__ void send(const float (&sums)[S::kSums]) const {
    const int first = static_cast<int>(threadIdx.x) / kGroupThreads * S::kFragments;
    const uint32_t stride = cluster_ * kGroupThreads * 16;
    int owner = first % cluster_;
    uint32_t place = sums_ + first / cluster_ * stride +
                     (rank_ * kGroupThreads + threadIdx.x % kGroupThreads) * 16;
#pragma unroll
    for (int i = 0; i < S::kFragments; ++i) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
          "[%5];" ::"r"(address_in(place, owner)),
          "f"(sums[4 * i]), "f"(sums[4 * i + 1]), "f"(sums[4 * i + 2]), "f"(sums[4 * i + 3]),
          "r"(address_in(barrier_, owner))
          : "memory");
      if (++owner == cluster_) {
        owner = 0;
        place += stride;
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ void add_up(const Call<T>& call, const Output& output,
                                         float fraction) const {
    const int warp = threadIdx.x / kWarpSize;
    wait_for(barrier_, 0);
#pragma unroll 1
    for (int i = warp / 4; i * cluster_ + rank_ < S::kAllFragments; i += S::kGroups) {
      uint32_t place = sums_ + (i * cluster_ * kGroupThreads + threadIdx.x % kGroupThreads) * 16;
      float sum[4] = {};
#pragma unroll 4
      for (int source = 0; source < cluster_; ++source, place += kGroupThreads * 16) {
        uint32_t v[4];
        read_shared(place, v);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += __uint_as_float(v[j]);
      }
#pragma unroll
      for (float& v : sum) v *= fraction;
      const int f = i * cluster_ + rank_;
      const int64_t row =
          (int64_t{output.row_tile} * S::kGroups + f / S::kFragments) * kTile + warp % 4 * kBand;
      write_fragment(call, row, int64_t{output.token_tile} * S::kTokens + f % S::kFragments * 8,
                     sum);
    }
  }

 private:
  const int cluster_, rank_;
  const uint32_t sums_, barrier_;
};

#endif

template <typename K>
__global__ void __launch_bounds__(K::S::kThreads, K::S::kBlocks)
    warpgroup_kernel(const __grid_constant__ Maps maps,
                     const __grid_constant__ Call<typename K::T> call,
                     const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = typename K::S;
  GRACE_DYNAMIC_SHARED(unaligned);
  unsigned char* const barriers = unaligned + (-shared_address(unaligned) & 1023);
  unsigned char* const shared = barriers + kBarrierBytes;
  const uint32_t after = shared_address(shared) + work.stages * K::kBytes;
  const Ring<K> ring(shared_address(shared), shared_address(barriers), work.stages);
  const int rank = static_cast<int>(cluster_rank());
  const int first = work.pairs * rank / work.cluster;
  const int last = work.pairs * (rank + 1) / work.cluster;
  const int step = static_cast<int>(gridDim.x) / work.cluster;
  int index = static_cast<int>(blockIdx.x) / work.cluster;
  // The same in all lanes, as the compiler learns from this.
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / kWarpSize, 0);

  const Meeting<S> meeting(work.cluster, after, shared_address(barriers) + 2 * kMostStages * 8);
  if (threadIdx.x == 0) {
    ring.init();
    if (work.cluster > 1) meeting.init();
  }
  __syncthreads();
  if (work.cluster > 1) cluster_arrive();  // this block runs and has its barriers

  if (warp >= S::kMultipliers / kWarpSize) {
    if constexpr (S::kTakesRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == S::kMultipliers / kWarpSize)
      Copier<K>(maps, work, ring, first, last).run(index, step);
    if (work.cluster > 1) cluster_wait();
    return;
  }

  if constexpr (S::kTakesRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  wait_for_previous_kernel();
  constexpr float kFraction = 1.0f / RowScale<K::kBits, typename K::T>::kFraction;
  Multiplier<K> multiplier(ring, work);
  const Writer<S, typename K::T> writer(call, after);
  for (; index < work.row_tiles * work.token_tiles; index += step) {
    const Output output(work, index);
    float sums[S::kSums] = {};
    multiplier.run(last - first, sums);
    if (work.cluster > 1) {
      cluster_wait();
      meeting.send(sums);
      meeting.add_up(call, output, kFraction);
    } else {
      writer.write(output, sums, kFraction);
    }
  }
#endif
}

// --- variants ------------------------------------------------------------------------------------

// Calls f(shape, cluster) with what a variant's number stands for: 8 * shape + cluster - 1.
template <typename F>
bool with_variant(int variant, F&& f) {
  const int cluster = variant % 8 + 1;
  switch (variant / 8) {
    case 0:
      return f(Shape<8, 2>{}, cluster);
    case 1:
      return f(Shape<8, 3>{}, cluster);
    case 2:
      return f(Shape<8, 4>{}, cluster);
    case 3:
      return f(Shape<16, 2>{}, cluster);
    case 4:
      return f(Shape<16, 3>{}, cluster);
    case 5:
      return f(Shape<32, 2>{}, cluster);
    case 6:
      return f(Shape<32, 3>{}, cluster);
    case 7:
      return f(Shape<64, 2>{}, cluster);
    case 8:
      return f(Shape<64, 3>{}, cluster);
    case 9:
      return f(Shape<96, 3>{}, cluster);
    case 10:
      return f(Shape<128, 2>{}, cluster);
    case 11:
      return f(Shape<128, 3>{}, cluster);
    case 12:
      return f(Shape<160, 2>{}, cluster);
    case 13:
      return f(Shape<176, 2>{}, cluster);
    case 14:
      return f(Shape<192, 2>{}, cluster);
    case 15:
      return f(Shape<224, 2>{}, cluster);
    case 16:
      return f(Shape<256, 2>{}, cluster);
    default:
      return false;
  }
}
constexpr int kWarpgroupVariants = 17 * 8;

// Of shared memory, beside the stages: alignment, barriers, and where sums meet or leave from.
template <typename S>
int fixed_bytes(int cluster) {
  const int met = ceil_div(S::kAllFragments, cluster) * cluster * kGroupThreads * 16;
  const int leaving = S::kMultipliers / kWarpSize * 32 * kBand * 2;
  return 1024 + kBarrierBytes + (cluster > 1 ? met : leaving);
}

template <typename K>
int stages_of(int cluster, const Device& device) {
  constexpr int kReserved = 1024;  // of a block, by CUDA
  const int all = device.shared_bytes + kReserved;
  const int shared = all / K::S::kBlocks - kReserved;
  return std::min(kMostStages, (shared - fixed_bytes<typename K::S>(cluster)) / K::kBytes);
}

template <typename K, typename T>
bool fits(const Call<T>& call, int cluster, const Device& device) {
  const Problem& p = call.problem;
  constexpr int kTokens = K::S::kTokens;
  // At least half of the rows of x that are multiplied are there; a block of eight is alone. K is
  // split only while there are multiprocessors for the parts.
  const bool rows = kTokens == 8 ? p.m <= 8 : kTokens == 16 || p.m > kTokens / 2;
  const int64_t outputs =
      ceil_div<int64_t>(p.n_tiles, K::S::kGroups) * ceil_div<int64_t>(p.m, kTokens);
  const bool splits = outputs * (cluster - 1) <= 2 * K::S::kBlocks * device.processors;
  return device.capability == 90 && readable(call) &&
         call.scales.is_bf16 == std::is_same_v<T, bf16> && p.k_tiles >= 2 * cluster &&
         stages_of<K>(cluster, device) >= 3 && p.m < 1 << 30 && rows && splits;
}

template <typename K>
Maps maps_of(const Call<typename K::T>& call, const Work& work) {
  using S = typename K::S;
  const Problem& p = call.problem;
  const auto u = [](auto v) { return static_cast<cuuint64_t>(v); };
  constexpr auto kType = std::is_same_v<typename K::T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  constexpr cuuint32_t kRow = 256, kRows = K::kTileBytes / 4 / kRow;  // words of a tile
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
                              {kRow * 4, K::kTileBytes, u(p.k_tiles) * K::kTileBytes},
                              {kRow, kRows, S::kStageTiles, S::kGroups},
                              CU_TENSOR_MAP_SWIZZLE_NONE});
  maps.scales = tensor_map<2>({kType,
                               call.scales.data,
                               {u(call.scales.stride), u(p.groups())},
                               {u(call.scales.stride) * 2},
                               {S::kGroups * kTile, static_cast<cuuint32_t>(work.stage_scales)},
                               CU_TENSOR_MAP_SWIZZLE_NONE});
  return maps;
}

template <typename K>
void launch_warpgroup(const Call<typename K::T>& call, int cluster, int device_index) {
  using S = typename K::S;
  const Device& device = Device::of(device_index);
  const Problem& p = call.problem;
  const auto i = [](int64_t x) { return static_cast<int>(x); };
  constexpr int kStageColumns = S::kStageTiles * kTile;
  Work work = {};
  work.pairs = i(ceil_div<int64_t>(p.k_tiles, 2));
  work.row_tiles = i(ceil_div<int64_t>(p.n_tiles, S::kGroups));
  work.token_tiles = i(ceil_div<int64_t>(p.m, S::kTokens));
  work.cluster = cluster;
  work.stages = stages_of<K>(cluster, device);
  work.stage_scales = K::kWide ? 1 : std::max(1, kStageColumns / i(p.group_size));
  work.scales_stages = i(ceil_div<int64_t>(p.group_size, kStageColumns));
  const int outputs = work.row_tiles * work.token_tiles;
  const auto clusters = static_cast<unsigned>(
      cluster > 1 ? outputs : std::min(outputs, device.processors * S::kBlocks));
  LaunchShape shape{clusters * cluster, S::kThreads,
                    static_cast<size_t>(fixed_bytes<S>(cluster) + work.stages * K::kBytes)};
  shape.dependent = true;
  shape.cluster = static_cast<unsigned>(cluster);
  launch(warpgroup_kernel<K>, shape, device_index, maps_of<K>(call, work), call, work);
}

// Calls f(kind) with the kind of kernel that a call needs; false where there is none.
template <int kBits, typename S, typename T, typename F>
bool with_kind(const Call<T>& call, F&& f) {
  const Problem& p = call.problem;
  if (p.groups() == 1 || p.group_size % (2 * kTile) == 0) return f(Kind<kBits, S, true, T>{});
  if (p.group_size == kTile || p.group_size == kTile / 2) return f(Kind<kBits, S, false, T>{});
  return false;
}

}  // namespace

template <int kBits, typename T>
bool warpgroup_runs(const Call<T>& call, int variant, int device) {
  return with_variant(variant, [&](auto shape, int cluster) {
    return with_kind<kBits, decltype(shape)>(
        call, [&](auto kind) { return fits<decltype(kind)>(call, cluster, Device::of(device)); });
  });
}

template <int kBits, typename T>
void warpgroup(const Call<T>& call, int variant, int device) {
  with_variant(variant, [&](auto shape, int cluster) {
    return with_kind<kBits, decltype(shape)>(call, [&](auto kind) {
      launch_warpgroup<decltype(kind)>(call, cluster, device);
      return true;
    });
  });
}

}  // namespace grace::dequant_gemm

#else

namespace grace::dequant_gemm {

constexpr int kWarpgroupVariants = 0;

template <int kBits, typename T>
bool warpgroup_runs(const Call<T>&, int, int) {
  return false;
}

template <int kBits, typename T>
void warpgroup(const Call<T>&, int, int) {}

}  // namespace grace::dequant_gemm

#endif
