// The warps of warpgroup.h that multiply: codes out of a stage of the ring, as operand A of wgmma
// or mma.sync.
#pragma once

#include "common/mma.h"
#include "common/shared_memory.h"
#include "common/wgmma.h"
#include "ops/dequant_gemm/warpgroup_ring.h"

namespace grace::dequant_gemm {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A warp's 16 rows of a tile of K: as they came, and as operand A of four products.
template <typename K>
class Codes {
  using S = typename K::S;
  using T = typename K::T;
  static constexpr int kBits = K::kBits;

 public:
  __device__ __forceinline__ explicit Codes(const Work& work) : bf16_scales_(work.bf16_scales) {
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
      low_ = scale(scales_);
      high_ = scale(scales_ + 16);
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
        rows_[0].set(scale(scales_ + next_half_));
        rows_[1].set(scale(scales_ + next_half_ + 16));
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
  // A scale in x's dtype. What is trained, 2^-17 to 65504 in bfloat16, is exact in float16.
  __device__ __forceinline__ uint32_t scale(uint32_t from) const {
    const uint32_t bits = read_shared_half(from);
    if constexpr (std::is_same_v<T, fp16>) {
      if (bf16_scales_) return from_float<fp16>(float_of_bits(bits << 16)).bits;
    }
    return bits;
  }

  const bool bf16_scales_;
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
      load_fragments<false>(x[j][0], from);
      load_fragments<false>(x[j][1], from ^ 64);  // chunks 4 to 7
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

#endif

}  // namespace
}  // namespace grace::dequant_gemm
