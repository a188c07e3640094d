// dequant_gemm for many rows of x by wgmma, sm_90a.
//
// A block computes 64 rows of the weight for each of its warpgroups, times `kTokens` rows of x. The
// weight is operand A: a lane's codes become its registers of A, each code times its scale rounded
// once to x's dtype. x is operand B, from shared memory. One more warp keeps a ring of stages full,
// a tile of K each: x through a tensor map, tiles of codes and rows of scales as they lie.
//
// Where there are fewer tiles of output than multiprocessors, a cluster of blocks splits K and adds
// up in one order. The order of every sum depends on the variant and on K alone.
#include "ops/dequant_gemm/plans.h"

#if defined(GRACE_WITH_SM90A) && !defined(GRACE_EMULATE)
#include <algorithm>
#include <cstring>

#include "common/bulk_copy.h"
#include "common/cluster.h"
#include "common/wgmma.h"
#include "ops/dequant_gemm/tensor_core.h"

namespace grace::dequant_gemm {
namespace {

constexpr int kGroupThreads = 4 * kWarpSize;  // of a warpgroup
constexpr int kMostStages = 32;

template <int kTokens_, int kGroups_>
struct Shape {
  static constexpr int kTokens = kTokens_;  // rows of x
  static constexpr int kGroups = kGroups_;  // warpgroups that multiply
  static constexpr int kMultipliers = kGroups * kGroupThreads;
  // With many sums the multiplying warps take registers over from a whole warpgroup that copies.
  static constexpr bool kTakesRegisters = kTokens * kGroups > 256;
  static constexpr int kManyRegisters = kGroups == 2 ? 240 : 160;
  static constexpr int kThreads = kMultipliers + (kTakesRegisters ? kGroupThreads : kWarpSize);
  static constexpr int kFragments = kTokens / 8;              // of sums, of a warp
  static constexpr int kAllFragments = kFragments * kGroups;  // of the block's warps of one number
};

// A stage of the ring: x, codes, and the scales of two groups of K.
template <int kBits, typename S>
struct Stage {
  static constexpr int kTileBytes = Layout<kBits>::kTileWords * 4;
  static constexpr int kCodes = S::kTokens * kTile * 2;
  static constexpr int kScales = kCodes + S::kGroups * kTileBytes;
  static constexpr int kGroupScales = S::kGroups * kTile * 2;
  static constexpr int kBytes = (kScales + 2 * kGroupScales + 1023) / 1024 * 1024;
};

struct Work {
  int m, k_tiles, n_tiles;
  int row_tiles, token_tiles;  // of the output
  int cluster, stages;
  int group_size;  // a multiple of 64, or 32
  int scale_stride;
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

// Where a warpgroup turns its sums round, rows of x by rows of the weight: so many rows of x at a
// time. The stride keeps both ways of access free of bank conflicts.
constexpr int kTurned = 16;
constexpr int kTurnedStride = kTile + 4;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The ring of stages as one thread walks it: where it stands, and the parity of this round.
template <int kBits, typename S>
class Ring {
 public:
  __device__ __forceinline__ Ring(unsigned char* stages, uint64_t* barriers, int count)
      : first_stage_(stages),
        stage_(stages),
        first_barrier_(barriers),
        end_(barriers + count),
        barrier_(barriers) {}

  __device__ __forceinline__ unsigned char* stage() const { return stage_; }
  __device__ __forceinline__ int parity() const { return parity_; }

  // All bytes of the stage have come; its bytes were used by all warps.
  __device__ __forceinline__ uint64_t* full() const { return barrier_; }
  __device__ __forceinline__ uint64_t* empty() const { return barrier_ + kMostStages; }

  __device__ __forceinline__ void init() const {
    for (uint64_t* barrier = first_barrier_; barrier < end_; ++barrier) {
      init_barrier(barrier, 1);
      init_barrier(barrier + kMostStages, S::kMultipliers / kWarpSize);
    }
    fence_barriers();
  }

  __device__ __forceinline__ void next() {
    stage_ += Stage<kBits, S>::kBytes;
    if (++barrier_ == end_) {
      stage_ = first_stage_;
      barrier_ = first_barrier_;
      parity_ ^= 1;
    }
  }

 private:
  unsigned char *const first_stage_, *stage_;
  uint64_t *const first_barrier_, *const end_, *barrier_;
  int parity_ = 0;
};

// --- the warp that copies
// -------------------------------------------------------------------------

template <int kBits, typename S, typename T>
class Copier {
 public:
  __device__ __forceinline__ Copier(const CUtensorMap& x, const Call<T>& call, const Work& work,
                                    const Ring<kBits, S>& ring, int first, int last)
      : x_(x), call_(call), work_(work), ring_(ring), first_(first), last_(last) {}

  __device__ __forceinline__ void run(int index, int step) {
    const int outputs = work_.row_tiles * work_.token_tiles;
    if (index >= outputs) return;
    // Weights are no kernel's output: their first copies start before the kernel ahead has ended.
    const Output first(work_, index);
    const int ahead = min(work_.stages, last_ - first_);
    Ring<kBits, S> early = ring_;
    for (int tile = first_; tile < first_ + ahead; ++tile, early.next())
      weights(early, first, tile);
    wait_for_previous_kernel();
    for (int tile = first_; tile < first_ + ahead; ++tile, ring_.next()) x(first, tile);
    copy(first, first_ + ahead);
    for (index += step; index < outputs; index += step) copy(Output(work_, index), first_);
  }

 private:
  __device__ __forceinline__ void copy(const Output& output, int tile) {
    for (; tile < last_; ++tile, ring_.next()) {
      wait_for(ring_.empty(), ring_.parity() ^ 1);
      weights(ring_, output, tile);
      x(output, tile);
    }
  }

  __device__ __forceinline__ void weights(const Ring<kBits, S>& ring, const Output& output,
                                          int tile) const {
    using Here = Stage<kBits, S>;
    const int first_row = output.row_tile * S::kGroups;
    const int rows = min(S::kGroups, work_.n_tiles - first_row);
    const int groups = work_.group_size < kTile ? 2 : 1;
    expect_bytes(ring.full(), Here::kCodes + rows * (Here::kTileBytes + groups * kTile * 2));
    const uint32_t* codes =
        call_.qweight + (int64_t{first_row} * work_.k_tiles + tile) * Layout<kBits>::kTileWords;
#pragma unroll
    for (int i = 0; i < S::kGroups; ++i)
      if (i < rows)
        bulk_copy(ring.stage() + Here::kCodes + i * Here::kTileBytes,
                  codes + int64_t{i} * work_.k_tiles * Layout<kBits>::kTileWords, Here::kTileBytes,
                  ring.full());
    const auto* scales = static_cast<const uint16_t*>(call_.scales.data) + first_row * kTile +
                         int64_t{tile * kTile / work_.group_size} * work_.scale_stride;
    for (int i = 0; i < groups; ++i)
      bulk_copy(ring.stage() + Here::kScales + i * Here::kGroupScales,
                scales + i * work_.scale_stride, rows * kTile * 2, ring.full());
  }

  __device__ __forceinline__ void x(const Output& output, int tile) const {
    bulk_copy_box(ring_.stage(), x_, tile * kTile, output.token_tile * S::kTokens, ring_.full());
  }

  const CUtensorMap& x_;
  const Call<T>& call_;
  const Work& work_;
  Ring<kBits, S> ring_;
  const int first_, last_;
};

// --- the warps that multiply
// ----------------------------------------------------------------------

// A warp's 16 rows of a tile of K, as operand A of four products.
struct Weights {
  uint32_t a[16];
};

template <int kBits, typename S, typename T>
__device__ __forceinline__ void read_weights(const unsigned char* stage, bool two_groups,
                                             Weights& w) {
  using Here = Stage<kBits, S>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto* const from = reinterpret_cast<const uint4*>(stage + Here::kCodes) +
                           warp * (Layout<kBits>::kBandWords / 4) + lane;
  const auto* const scales =
      reinterpret_cast<const uint16_t*>(stage + Here::kScales) + warp * kBand + lane / 4;
  uint4 words[kBits / 4];
#pragma unroll
  for (int i = 0; i < kBits / 4; ++i) words[i] = from[i * kWarpSize];
  RowScale<kBits, T> rows[2];
  rows[0].set(scales[0]);
  rows[1].set(scales[8]);
#pragma unroll
  for (int block = 0; block < kBlocksPerTile; ++block) {
    if (block == kBlocksPerTile / 2 && two_groups) {
      rows[0].set(scales[Here::kGroupScales / 2]);
      rows[1].set(scales[Here::kGroupScales / 2 + 8]);
    }
    uint32_t a[4];
    decode_weights<kBits, T>(
        reinterpret_cast<const uint32_t*>(words) + block * Layout<kBits>::kBlockWords, rows, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) w.a[block * 4 + i] = a[i];
  }
}

template <int kBits, typename S, typename T>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const Ring<kBits, S>& ring, bool two_groups)
      : ring_(ring), two_groups_(two_groups) {}

  // The sums of `tiles` tiles of K, from the ring's next stages.
  __device__ __forceinline__ void run(int tiles, float (&sums)[S::kTokens / 2]) {
    Weights even, odd;
    enter(even);
    for (int left = tiles, add = 0; left > 0; add = 1) {
      multiply(even, odd, left, add, sums);
      if (left > 0) multiply(odd, even, left, 1, sums);
    }
  }

 private:
  __device__ __forceinline__ void enter(Weights& w) {
    wait_for(ring_.full(), ring_.parity());
    read_weights<kBits, S, T>(ring_.stage(), two_groups_, w);
  }

  // Multiplies a stage by `now`, and meanwhile makes the weights of the next one.
  __device__ __forceinline__ void multiply(Weights& now, Weights& next, int& left, int add,
                                           float (&sums)[S::kTokens / 2]) {
    uint64_t* const used = ring_.empty();
    const uint32_t x = wgmma_operand(shared_address(ring_.stage()));
    fence_operands(now.a);
    fence_operands(sums);
    wgmma_fence();
#pragma unroll
    for (int block = 0; block < kBlocksPerTile; ++block)
      wgmma<T, S::kTokens>(sums, now.a + block * 4, x + block * 2, block > 0 ? 1 : add);
    wgmma_commit();
    ring_.next();
    if (--left > 0) enter(next);
    wgmma_wait();
    fence_operands(now.a);
    fence_operands(sums);
    if (threadIdx.x % kWarpSize == 0) arrive(used);
  }

  Ring<kBits, S> ring_;
  const bool two_groups_;
};

// --- the end of a tile of output
// ------------------------------------------------------------------

__device__ __forceinline__ void group_barrier() {
  asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.x / kGroupThreads + 1), "n"(kGroupThreads)
               : "memory");
}

// Four neighbouring outputs.
template <typename T>
__device__ __forceinline__ void write_four(const Call<T>& call, int64_t m, int64_t column,
                                           const float (&v)[4]) {
  const int64_t columns = call.columns();
  const int64_t at = m * columns + column;
  if (columns % 4 == 0) {
    if (column >= columns) return;
    alignas(8) T out[4];
    if (call.residual != nullptr) {
      alignas(8) T residual[4];
      const uint2 words = *reinterpret_cast<const uint2*>(call.residual + at);
      std::memcpy(residual, &words, 8);
      for (int i = 0; i < 4; ++i) out[i] = from_float<T>(v[i] + to_float(residual[i]));
    } else {
      for (int i = 0; i < 4; ++i) out[i] = from_float<T>(v[i]);
    }
    uint2 words;
    std::memcpy(&words, out, 8);
    *reinterpret_cast<uint2*>(call.out + at) = words;
  } else {
    for (int i = 0; i < 4; ++i)
      if (column + i < columns) call.out[at + i] = call.finished(v[i], m, column + i);
  }
}

// kTurned rows of x from `turned`: bias, SwiGLU, residual, rounding.
template <typename T>
__device__ __forceinline__ void write_turned(const Call<T>& call, int64_t row, int64_t m,
                                             const float* turned) {
  const int threads = call.swiglu ? kTile / 8 : kTile / 4;  // of a row of x
  const int thread = threadIdx.x % kGroupThreads;
  const int within =
      call.swiglu ? thread % threads / 2 * kBand + thread % 2 * 4 : thread % threads * 4;
  for (int i = thread / threads; i < kTurned && m + i < call.problem.m;
       i += kGroupThreads / threads) {
    const float* const from = turned + i * kTurnedStride + within;
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = call.biased(from[j], row + within + j);
      if (call.swiglu) v[j] = swiglu(v[j], call.biased(from[j + 8], row + within + 8 + j));
    }
    write_four(call, m + i, call.swiglu ? swiglu_column(row + within) : row + within, v);
  }
}

template <typename S, typename T>
__device__ __forceinline__ void write_sums(const Call<T>& call, const Output& output,
                                           const float (&sums)[S::kTokens / 2], float fraction,
                                           float* turned) {
  const int lane = threadIdx.x % kWarpSize, group = threadIdx.x / kGroupThreads;
  turned += group * kTurned * kTurnedStride;
  float* const to =
      turned + lane % 4 * 2 * kTurnedStride + threadIdx.x / kWarpSize % 4 * kBand + lane / 4;
  const int64_t row = (int64_t{output.row_tile} * S::kGroups + group) * kTile;
  int64_t m = int64_t{output.token_tile} * S::kTokens;
#pragma unroll
  for (int i = 0; i < S::kTokens / kTurned; ++i, m += kTurned) {
    if (i > 0) group_barrier();
#pragma unroll
    for (int f = 0; f < kTurned / 8; ++f) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        to[(f * 8 + j % 2) * kTurnedStride + j / 2 * 8] =
            sums[(i * kTurned / 8 + f) * 4 + j] * fraction;
    }
    group_barrier();
    write_turned(call, row, m, turned);
  }
  group_barrier();
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
    warpgroup_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ Call<T> call,
                     const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  GRACE_DYNAMIC_SHARED(unaligned);
  // The swizzle counts from multiples of 1024 bytes.
  unsigned char* const shared = unaligned + (-shared_address(unaligned) & 1023);
  auto* const barriers =
      reinterpret_cast<uint64_t*>(shared + work.stages * Stage<kBits, S>::kBytes);
  auto* const sums_place = reinterpret_cast<float4*>(barriers + 2 * kMostStages);
  const Ring<kBits, S> ring(shared, barriers, work.stages);
  const int rank = static_cast<int>(cluster_rank());
  const int first = work.k_tiles * rank / work.cluster;
  const int last = work.k_tiles * (rank + 1) / work.cluster;
  const int step = static_cast<int>(gridDim.x) / work.cluster;
  int index = static_cast<int>(blockIdx.x) / work.cluster;

  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  if (work.cluster > 1) cluster_arrive();  // this block runs

  if (threadIdx.x >= S::kMultipliers) {
    if constexpr (S::kTakesRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == S::kMultipliers)
      Copier<kBits, S, T>(x, call, work, ring, first, last).run(index, step);
    __syncwarp();
    if (work.cluster > 1) {
      cluster_wait();
      cluster_barrier(work.cluster);
    }
    return;
  }

  if constexpr (S::kTakesRegisters)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kManyRegisters));
  wait_for_previous_kernel();
  constexpr float kFraction = 1.0f / RowScale<kBits, T>::kFraction;
  Multiplier<kBits, S, T> multiplier(ring, work.group_size < kTile);
  for (; index < work.row_tiles * work.token_tiles; index += step) {
    const Output output(work, index);
    float sums[S::kTokens / 2];
    multiplier.run(last - first, sums);
    if (work.cluster > 1) {
      cluster_wait();
      share_sums<S>(sums, work.cluster, rank, sums_place);
      cluster_barrier(work.cluster);
      write_shared<S>(call, output, work.cluster, rank, kFraction, sums_place);
    } else {
      write_sums<S>(call, output, sums, kFraction, reinterpret_cast<float*>(sums_place));
    }
  }
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
      return f(Shape<256, 2>{}, cluster);
    default:
      return false;
  }
}
constexpr int kVariants = 12 * 8;

// Of shared memory, beside the stages: their alignment and barriers, and where sums meet.
template <typename S>
int fixed_bytes(int cluster) {
  const int met = ceil_div(S::kAllFragments, cluster) * cluster * kGroupThreads * 16;
  const int turned = S::kGroups * kTurned * kTurnedStride * 4;
  return 1024 + 2 * kMostStages * 8 + (cluster > 1 ? met : turned);
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
  return device.capability == 90 && readable(call) &&
         call.scales.is_bf16 == std::is_same_v<T, bf16> && p.k_tiles >= cluster &&
         stages_of<kBits, S>(cluster, device) >= 3 && p.m < 1 << 30 &&
         (p.m + 7) / 8 * 8 * 2 > tokens;
}

template <int kBits, typename S, typename T>
void launch_warpgroup(const Call<T>& call, int cluster, int device_index) {
  const Device& device = Device::of(device_index);
  const Problem& p = call.problem;
  const auto i = [](int64_t x) { return static_cast<int>(x); };
  const int stages = stages_of<kBits, S>(cluster, device);
  const Work work{i(p.m),
                  i(p.k_tiles),
                  i(p.n_tiles),
                  i(ceil_div<int64_t>(p.n_tiles, S::kGroups)),
                  i(ceil_div<int64_t>(p.m, S::kTokens)),
                  cluster,
                  stages,
                  i(p.group_size),
                  i(call.scales.stride)};
  const int outputs = work.row_tiles * work.token_tiles;
  const auto clusters =
      static_cast<unsigned>(cluster > 1 ? outputs : std::min(outputs, device.processors));
  LaunchShape shape{
      clusters * cluster, S::kThreads,
      static_cast<size_t>(fixed_bytes<S>(cluster) + stages * Stage<kBits, S>::kBytes)};
  shape.dependent = true;
  shape.cluster = static_cast<unsigned>(cluster);
  const CUtensorMap x = matrix_map(call.x, std::is_same_v<T, bf16>, p.m, p.k, S::kTokens);
  launch(warpgroup_kernel<kBits, S, T>, shape, device_index, x, call, work);
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
