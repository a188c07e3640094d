// dequant_gemm for few rows of x, sm_80 and later: a read of the weight at the speed of memory.
//
// A block computes bands of 16 rows of the weight, one after another; its warps split K, each reads
// its tiles of a band straight into registers as the fragments they are, many loads ahead of use,
// across the end of a band into the next one. x stays in shared memory, in the order of operand B's
// fragments. Sums meet in shared memory at the end of a band. Where x is too much for one block, a
// cluster of blocks splits K again, and their sums meet through each other's shared memory.
//
// The split of K depends on the variant and on K alone, so a row of the result does not depend on
// the others, and sums are added in one order.
#include <algorithm>
#include <type_traits>

#include "common/launch.h"
#include "common/mma.h"
#include "ops/dequant_gemm/plans.h"

namespace grace::dequant_gemm {
namespace {

// --- what differs between a GPU and its emulation ------------------------------------------------

// Weights are read once: they need no place in the caches.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
#if defined(GRACE_EMULATE)
  return *from;
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
#endif
}

__device__ __forceinline__ uint32_t load_scale(const uint16_t* from) {
#if defined(GRACE_EMULATE)
  return *from;
#else
  uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(from));
  return v;
#endif
}

__device__ __forceinline__ unsigned cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// All threads of all blocks of the cluster; what they wrote before is visible after.
__device__ __forceinline__ void cluster_barrier(unsigned blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
    return;
  }
#endif
  __syncthreads();
}

// To the same place of shared memory in block `rank` of the cluster.
__device__ __forceinline__ void store_to_block(float4* place, float4 v, unsigned rank,
                                               unsigned blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(place)), remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
    return;
  }
#endif
  *place = v;
}

// --- sizes ----------------------------------------------------------------------------------------

template <int kTiles_, int kBands_, int kWarps_, int kAhead_, int kBlocksPerSm_>
struct Shape {
  static constexpr int kTiles = kTiles_;  // of 8 rows of x
  static constexpr int kBands = kBands_;  // of 16 rows of the weight, that a warp has in work
  static constexpr int kWarps = kWarps_;  // that split K
  static constexpr int kAhead = kAhead_;  // tiles of 4-bit codes that a warp loads ahead
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kParts = kBands * kTiles;  // fragments of sums of a warp
  static constexpr int kSumBytes = kParts * kThreads * 16;
};

constexpr int kXTileBytes = 1024;  // fragments of 8 rows and 64 columns of x

struct Split {
  int blocks;       // of a cluster
  int first, last;  // tiles of K that this block has

  __device__ Split(int k_tiles, unsigned cluster_blocks)
      : blocks(static_cast<int>(cluster_blocks)) {
    const int rank = static_cast<int>(cluster_rank());
    first = k_tiles * rank / blocks;
    last = k_tiles * (rank + 1) / blocks;
  }
};

// Divides numbers below 2^16 by one below 2^16, without a division.
struct Divider {
  uint32_t magic;

  static Divider of(int64_t divisor) {
    return {static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor)};
  }
  __device__ __forceinline__ int operator()(int x) const {
    if (magic == 0) return x;  // 2^32 / 1
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(x)) * magic) >> 32);
  }
};

// What the kernel needs beside the call.
struct Walk {
  int cluster;           // blocks that split K
  Divider tiles_a_group; // when two_groups is false
  bool two_groups;       // of 32 columns a tile; else a tile lies in one group
};

// --- x into shared memory --------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ uint32_t load_pair(const T* row, int64_t column, int64_t k) {
  if (column + 1 < k && k % 2 == 0) return *reinterpret_cast<const uint32_t*>(row + column);
  const auto bits = [](T v) {
    uint16_t b;
    memcpy(&b, &v, 2);
    return uint32_t{b};
  };
  return (column < k ? bits(row[column]) : 0) | (column + 1 < k ? bits(row[column + 1]) << 16 : 0);
}

// [tile][8 rows of x][half][lane]: for blocks 2 half and 2 half + 1 of the tile the two registers of
// operand B. Rows that x has not are left out: nothing reads them.
template <int kTiles, int kThreads, typename T>
__device__ __forceinline__ void load_x(const Call<T>& call, const Split& split, uint4* shared) {
  const int count = (split.last - split.first) * kTiles * 2 * kWarpSize;
  const int64_t k = call.problem.k;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int lane = i % kWarpSize, half = i / kWarpSize % 2, j = i / (2 * kWarpSize) % kTiles;
    const int m = j * 8 + lane / 4;
    if (m >= call.problem.m) continue;
    const int tile = split.first + i / (2 * kWarpSize * kTiles);
    const T* const row = call.x + m * k;
    const int64_t column = int64_t{tile} * kTile + half * 2 * kBlock + 2 * (lane % 4);
    shared[i] = {load_pair(row, column, k), load_pair(row, column + 8, k),
                 load_pair(row, column + 16, k), load_pair(row, column + 24, k)};
  }
}

// --- the stream of weights -----------------------------------------------------------------------

// One tile's share of a warp, on its way from memory.
template <int kBits, int kBands>
struct Slot {
  uint4 words[kBands][kBits / 4];
  uint32_t scales[kBands][2][2];  // [group of the tile][row gid, row gid + 8], as they are stored
};

// Walks a warp's tiles, band after band, and starts their loads.
template <int kBits, int kBands>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Problem& p, const uint32_t* qweight, const Scales& scales,
                                    const Walk& walk, int first, int last, int64_t band,
                                    int64_t band_step)
      : p_(p),
        qweight_(qweight),
        scales_(scales),
        walk_(walk),
        first_(first),
        last_(last),
        tile_(first),
        band_(band),
        step_(band_step) {
    enter();
  }

  __device__ __forceinline__ bool more() const { return band_ * kBand < p_.n_tiles * kTile; }

  __device__ __forceinline__ void next(Slot<kBits, kBands>& slot) {
    if (!more()) return;
#pragma unroll
    for (int b = 0; b < kBands; ++b)
#pragma unroll
      for (int i = 0; i < kBits / 4; ++i)
        slot.words[b][i] = load_once(words_ + b * (Layout<kBits>::kBandWords / 4) + i * kWarpSize);
    const int groups = static_cast<int>(p_.groups());
    if (walk_.two_groups) {
      load_scales(slot, 0, std::min(2 * tile_, groups - 1));
      load_scales(slot, 1, std::min(2 * tile_ + 1, groups - 1));
    } else {
      load_scales(slot, 1, walk_.tiles_a_group(tile_));
    }
    words_ += Layout<kBits>::kTileWords / 4;
    if (++tile_ == last_) {
      tile_ = first_;
      band_ += step_;
      enter();
    }
  }

 private:
  __device__ __forceinline__ void enter() {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t tile_row = band_ / (kTile / kBand), band = band_ % (kTile / kBand);
    words_ = reinterpret_cast<const uint4*>(qweight_ +
                                            (tile_row * p_.k_tiles + first_) *
                                                Layout<kBits>::kTileWords +
                                            band * Layout<kBits>::kBandWords) +
             lane;
    rows_ = static_cast<const uint16_t*>(scales_.data) + band_ * kBand + lane / 4;
  }

  __device__ __forceinline__ void load_scales(Slot<kBits, kBands>& slot, int which, int group) {
    const uint16_t* from = rows_ + group * scales_.stride;
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
      slot.scales[b][which][0] = load_scale(from + b * kBand);
      slot.scales[b][which][1] = load_scale(from + b * kBand + 8);
    }
  }

  const Problem& p_;
  const uint32_t* qweight_;
  const Scales& scales_;
  const Walk& walk_;
  int first_, last_, tile_;
  int64_t band_, step_;
  const uint4* words_ = nullptr;
  const uint16_t* rows_ = nullptr;
};

// --- arithmetic ------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ float scale_of(uint32_t stored, bool is_bf16) {
  constexpr float kInverse = 1.0f / Fraction<T>::kValue;
  const auto bits = static_cast<uint16_t>(stored);
  return kInverse * (is_bf16 ? to_float(bf16{bits}) : to_float(fp16{bits}));
}

template <int kTiles>
struct Accumulators {
  float v[kTiles][4] = {};
};

// One tile of K, for the bands of a warp: codes exactly, scales in fp32 at the end of a group.
template <int kBits, typename S, typename T>
__device__ __forceinline__ void multiply_tile(const Slot<kBits, S::kBands>& slot, const uint4* x,
                                              int m, bool two_groups, bool is_bf16,
                                              Accumulators<S::kTiles> (&total)[S::kBands]) {
  const int lane = threadIdx.x % kWarpSize;
  Accumulators<S::kTiles> group[S::kBands];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 fragments[S::kTiles];
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
      fragments[j] = {0, 0, 0, 0};
      if (j * 8 + lane / 4 < m) fragments[j] = x[(j * 2 + half) * kWarpSize + lane];
    }
#pragma unroll
    for (int band = 0; band < S::kBands; ++band) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(slot.words[band]);
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        uint32_t a[4];
        decode_fractions<kBits, T>(words + (half * 2 + block) * Layout<kBits>::kBlockWords, a);
#pragma unroll
        for (int j = 0; j < S::kTiles; ++j) {
          const uint32_t b[2] = {block == 0 ? fragments[j].x : fragments[j].z,
                                 block == 0 ? fragments[j].y : fragments[j].w};
          mma_m16n8k16<T>(group[band].v[j], a, b);
        }
      }
    }
    if (half == 1 || two_groups) {
#pragma unroll
      for (int band = 0; band < S::kBands; ++band) {
        const float low = scale_of<T>(slot.scales[band][half][0], is_bf16);
        const float high = scale_of<T>(slot.scales[band][half][1], is_bf16);
#pragma unroll
        for (int j = 0; j < S::kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            total[band].v[j][i] += (i < 2 ? low : high) * group[band].v[j][i];
            group[band].v[j][i] = 0.0f;
          }
        }
      }
    }
  }
}

// --- the end of a band: sums of all warps, and of all blocks of a cluster ---------------------------

// Fragment p of the sums is added up by block p % blocks, there by warp p / blocks (rotated, so
// that not one warp always has the work). [place of p][warp of any block][lane]
template <typename S, typename T>
__device__ __forceinline__ void finish_band(const Call<T>& call,
                                            const Accumulators<S::kTiles> (&total)[S::kBands],
                                            int64_t band, int cluster, int turn, float4* sums) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int rank = static_cast<int>(cluster_rank());
  const int sources = cluster * S::kWarps;
#pragma unroll
  for (int p = 0; p < S::kParts; ++p) {
    const float(&v)[4] = total[p / S::kTiles].v[p % S::kTiles];
    float4* const place =
        sums + ((p / cluster) * sources + rank * S::kWarps + warp) * kWarpSize + lane;
    store_to_block(place, {v[0], v[1], v[2], v[3]}, p % cluster, cluster);
  }
  cluster_barrier(cluster);
  const int mine = (warp + turn) % S::kWarps;
  for (int place = mine; place * cluster + rank < S::kParts; place += S::kWarps) {
    float sum[4] = {};
    for (int source = 0; source < sources; ++source) {
      const float4 v = sums[(place * sources + source) * kWarpSize + lane];
      sum[0] += v.x;
      sum[1] += v.y;
      sum[2] += v.z;
      sum[3] += v.w;
    }
    const int p = place * cluster + rank;
    const int64_t row = (band + p / S::kTiles) * kBand + lane / 4;
    const int m = p % S::kTiles * 8 + lane % 4 * 2;
    const int64_t columns = call.columns();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (m + i >= call.problem.m) break;
      T* const out = call.out + (m + i) * columns;
      const float low = call.biased(sum[i], row), high = call.biased(sum[i + 2], row + 8);
      if (call.swiglu) {
        const int64_t column = swiglu_column(row);
        if (column < columns) out[column] = call.finished(swiglu(low, high), m + i, column);
      } else {
        if (row < columns) out[row] = call.finished(low, m + i, row);
        if (row + 8 < columns) out[row + 8] = call.finished(high, m + i, row + 8);
      }
    }
  }
}

// --- the kernel -------------------------------------------------------------------------------------

template <int kBits, typename S, typename T>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    decode_kernel(const Call<T> call, const Walk walk) {
  GRACE_DYNAMIC_SHARED(shared);
  const Problem& p = call.problem;
  const int warp = threadIdx.x / kWarpSize;
  const Split split(static_cast<int>(p.k_tiles), walk.cluster);
  float4* const sums = reinterpret_cast<float4*>(shared);  // twice, in turns
  uint4* const x = reinterpret_cast<uint4*>(shared + 2 * S::kSumBytes);

  const int tiles = split.last - split.first;
  const int first = split.first + tiles * warp / S::kWarps;
  const int last = split.first + tiles * (warp + 1) / S::kWarps;
  const int64_t step = int64_t{gridDim.x} / walk.cluster * S::kBands;
  const int64_t first_band = int64_t{blockIdx.x} / walk.cluster * S::kBands;
  const int64_t bands = p.n_tiles * (kTile / kBand);

  constexpr int kAhead = S::kAhead * 4 / kBits;  // the same bytes whatever the width
  Slot<kBits, S::kBands> slots[kAhead];
  Loader<kBits, S::kBands> loader(p, call.qweight, call.scales, walk, first, last, first_band,
                                  step);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) loader.next(slots[i]);

  wait_for_previous_kernel();
  load_x<S::kTiles, S::kThreads>(call, split, x);
  cluster_barrier(walk.cluster);  // also: every block runs before another writes to it

  Accumulators<S::kTiles> total[S::kBands];
  int64_t band = first_band;
  int tile = first, turn = 0;
  while (band < bands) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (band >= bands) break;
      multiply_tile<kBits, S, T>(slots[i], x + (tile - split.first) * S::kTiles * 2 * kWarpSize,
                                 static_cast<int>(p.m), walk.two_groups, call.scales.is_bf16,
                                 total);
      loader.next(slots[i]);
      if (++tile == last) {
        finish_band<S>(call, total, band, walk.cluster, turn,
                       sums + turn % 2 * (S::kSumBytes / 16));
#pragma unroll
        for (int b = 0; b < S::kBands; ++b) total[b] = {};
        tile = first;
        band += step;
        ++turn;
      }
    }
  }
}

// --- variants ---------------------------------------------------------------------------------------

struct Device {
  int capability, processors, shared_bytes;

  static const Device& of(int device);
};

#if defined(GRACE_EMULATE)
const Device& Device::of(int) {
  static const Device emulated{80, 2, 227 * 1024};
  return emulated;
}
#else
const Device& Device::of(int device) {
  constexpr int kMost = 64;
  static Device known[kMost];
  STD_TORCH_CHECK(device >= 0 && device < kMost, "grace: no such device: ", device);
  Device& d = known[device];
  if (d.capability == 0) {
    const auto get = [device](cudaDeviceAttr attribute) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "reading a device attribute");
      return value;
    };
    d.processors = get(cudaDevAttrMultiProcessorCount);
    d.shared_bytes = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    d.capability =
        get(cudaDevAttrComputeCapabilityMajor) * 10 + get(cudaDevAttrComputeCapabilityMinor);
  }
  return d;
}
#endif

using Few = Shape<1, 1, 16, 8, 1>;         // up to 8 rows of x
using FewHalf = Shape<1, 1, 8, 8, 2>;      // the same, two blocks a multiprocessor
using FewPairs = Shape<1, 2, 8, 8, 1>;     // two bands at once
using Sixteen = Shape<2, 1, 16, 7, 1>;     // up to 16
using SixteenPairs = Shape<2, 2, 8, 8, 1>;
using Some = Shape<4, 1, 16, 6, 1>;        // up to 32
using SomePairs = Shape<4, 2, 8, 7, 1>;

// Calls f(shape, cluster) with what a variant's number stands for: variant = 4 * shape + log2 of
// the blocks of a cluster.
template <typename F>
bool with_variant(int variant, F&& f) {
  const int cluster = 1 << variant % 4;
  switch (variant / 4) {
    case 0:
      return f(Few{}, cluster);
    case 1:
      return f(FewHalf{}, cluster);
    case 2:
      return f(FewPairs{}, cluster);
    case 3:
      return f(Sixteen{}, cluster);
    case 4:
      return f(SixteenPairs{}, cluster);
    case 5:
      return f(Some{}, cluster);
    case 6:
      return f(SomePairs{}, cluster);
    default:
      return false;
  }
}
constexpr int kVariants = 7 * 4;

template <typename S>
int64_t shared_bytes(const Problem& p, int cluster) {
  return 2 * S::kSumBytes + ceil_div<int64_t>(p.k_tiles, cluster) * S::kTiles * kXTileBytes;
}

template <typename S, typename T>
bool fits(const Call<T>& call, int cluster, const Device& device) {
  const Problem& p = call.problem;
  const bool groups = p.group_size % kTile == 0 || p.group_size == kTile / 2;
  return p.m <= S::kTiles * 8 && groups && !call.scales.is_float &&
         p.k_tiles < 1 << 16 && p.k_tiles >= int64_t{cluster} * S::kWarps &&
         (cluster == 1 || device.capability >= 90) &&
         shared_bytes<S>(p, cluster) * S::kBlocksPerSm + 1024 * (S::kBlocksPerSm - 1) <=
             device.shared_bytes;
}

template <int kBits, typename S, typename T>
void launch_decode(const Call<T>& call, int cluster, int device) {
  const Problem& p = call.problem;
  const Device& d = Device::of(device);
  const int64_t steps = p.n_tiles * (kTile / kBand) / S::kBands;
  const int64_t most = d.processors * S::kBlocksPerSm / cluster;
  const auto clusters = static_cast<unsigned>(std::min(steps, most));
  const Walk walk{cluster, Divider::of(std::max<int64_t>(1, p.group_size / kTile)),
                  p.group_size < kTile};
  LaunchShape shape{clusters * cluster, S::kThreads,
                    static_cast<size_t>(shared_bytes<S>(p, cluster))};
  shape.dependent = d.capability >= 90;
  shape.cluster = static_cast<unsigned>(cluster);
  launch(decode_kernel<kBits, S, T>, shape, device, call, walk);
}

}  // namespace

int decode_variants() { return kVariants; }

template <int kBits, typename T>
bool decode_runs(const Call<T>& call, int variant, int device) {
  return with_variant(variant, [&](auto shape, int cluster) {
    return fits<decltype(shape)>(call, cluster, Device::of(device));
  });
}

template <int kBits, typename T>
void decode(const Call<T>& call, int variant, int device) {
  with_variant(variant, [&](auto shape, int cluster) {
    launch_decode<kBits, decltype(shape)>(call, cluster, device);
    return true;
  });
}

#define GRACE_INSTANTIATE(bits, T)                                 \
  template bool decode_runs<bits>(const Call<T>&, int, int); \
  template void decode<bits>(const Call<T>&, int, int);
GRACE_INSTANTIATE(4, bf16)
GRACE_INSTANTIATE(4, fp16)
GRACE_INSTANTIATE(8, bf16)
GRACE_INSTANTIATE(8, fp16)
#undef GRACE_INSTANTIATE

}  // namespace grace::dequant_gemm
