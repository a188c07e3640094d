// The end of a tile of output of warpgroup.h: written by the warps themselves, or added up first by
// the blocks of a cluster that split K.
#pragma once

#include "common/cluster.h"
#include "common/mma.h"
#include "common/shared_memory.h"
#include "common/wgmma.h"
#include "ops/dequant_gemm/warpgroup_shapes.h"

namespace grace::dequant_gemm {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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
      for (int i = 0; i < 4; ++i)
        four[i] = pair_from_floats<T>(v[f * 4 + i * 2], v[f * 4 + i * 2 + 1]);
      store_turned(turned_place(f), four);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void add_residual(float* v) const {
#pragma unroll
    for (int f = 0; f < kLeaving / 8; f += 2) {
      uint32_t four[4];
      load_fragments<true>(four, turned_place(f));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[f * 4 + i * 2] += to_float(T{static_cast<uint16_t>(four[i])});
        v[f * 4 + i * 2 + 1] += to_float(T{static_cast<uint16_t>(four[i] >> 16)});
      }
    }
    __syncwarp();
  }

  // Calls f(place, offset, columns) for every chunk of this lane's: the same columns of some rows,
  // whose places lie evenly, since `place` repeats itself every 8 rows.
  template <typename F>
  __device__ __forceinline__ void for_chunks(int64_t m, int64_t column, int chunks, F&& f) const {
    const int lane = threadIdx.x % kWarpSize, shift = chunks - 1;
    const int chunk = lane & shift, step = kWarpSize >> shift;
    const int64_t columns = call_.columns(), left = columns - (column + chunk * 8);
    const int64_t rows = call_.problem.m - m;
    const int tokens = left <= 0 ? 0 : rows < kLeaving ? static_cast<int>(rows) : kLeaving;
    int token = lane >> shift;
    uint32_t at = place(token, chunk);
    int64_t offset = (m + token) * columns + column + chunk * 8;
    for (; token < tokens; token += step) {
      f(at, offset, left < 8 ? static_cast<int>(left) : 8);
      at += step * kBand * 2;
      offset += step * columns;
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

}  // namespace
}  // namespace grace::dequant_gemm
