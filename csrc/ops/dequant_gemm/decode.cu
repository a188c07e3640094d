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
  uint32_t v;  // a register that the load fills by itself: nothing waits for it here
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(v) : "l"(from));
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

  // Of the sums that meet in one block: its share of the parts, from all warps of the cluster.
  GRACE_HOST_DEVICE static constexpr int sum_bytes(int cluster) {
    return (kParts + cluster - 1) / cluster * cluster * kThreads * 16;
  }
};

constexpr int kXTileBytes = 1024;  // fragments of 8 rows and 64 columns of x

// What the kernel works with beside the call, in the integers that a GPU is quick with.
struct Walk {
  int m, k, k_tiles, bands, groups, scale_stride;
  int cluster;        // blocks that split K
  int tiles_a_group;  // unless a tile has two groups
};

// --- x into shared memory --------------------------------------------------------------------------

// [tile][8 rows of x][half][lane]: for blocks 2 half and 2 half + 1 of the tile the two registers of
// operand B. Rows that x has not are left out: nothing reads them. k is a multiple of 32.
template <int kTiles, int kThreads, typename T>
__device__ __forceinline__ void load_x(const T* x, const Walk& walk, int first, int tiles,
                                       uint4* shared) {
  for (int i = threadIdx.x; i < tiles * 8; i += kThreads) {
    const int tile = i / 8, half = i / 4 % 2, tig = i % 4;
    const int column = (first + tile) * kTile + half * 2 * kBlock;
    const bool inside = column < walk.k;
    uint4* const to = shared + (tile * kTiles * 2 + half) * kWarpSize + tig;
    const T* from = x + column + 2 * tig;
#pragma unroll 8
    for (int m = 0; m < walk.m; ++m) {
      uint4 v = {0, 0, 0, 0};
      if (inside) {
        const uint32_t* const pairs = reinterpret_cast<const uint32_t*>(from + m * walk.k);
        v = {pairs[0], pairs[4], pairs[8], pairs[12]};
      }
      to[m / 8 * 2 * kWarpSize + m % 8 * 4] = v;
    }
  }
}

// --- the stream of weights -----------------------------------------------------------------------

// One tile's share of a warp, on its way from memory.
template <int kBits, int kBands, int kGroups>
struct Slot {
  uint4 words[kBands][kBits / 4];
  uint32_t scales[kGroups][kBands][2];  // of rows gid and gid + 8, as they are stored
};

// Walks a warp's tiles, band after band, and starts their loads. Additions and counters only: what
// is done here is done for every tile.
template <int kBits, int kBands, int kGroups>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Walk& walk, const uint32_t* qweight, const void* scales,
                                    int first, int last, int band, int step)
      : walk_(walk),
        first_words_(reinterpret_cast<const uint4*>(qweight) +
                     int64_t{first} * (Layout<kBits>::kTileWords / 4) + threadIdx.x % kWarpSize),
        first_scales_(static_cast<const uint16_t*>(scales) +
                      (kGroups == 1 ? first / walk.tiles_a_group : kGroups * first) *
                          int64_t{walk.scale_stride} +
                      threadIdx.x % kWarpSize / 4),
        tiles_(last - first),
        first_left_(kGroups == 1 ? walk.tiles_a_group - first % walk.tiles_a_group : 1),
        second_(kGroups == 1 ? 0 : walk.scale_stride),
        step_(step),
        band_(band) {
    enter();
  }

  __device__ __forceinline__ void next(Slot<kBits, kBands, kGroups>& slot) {
    if (band_ < walk_.bands) {
#pragma unroll
      for (int b = 0; b < kBands; ++b) {
#pragma unroll
        for (int i = 0; i < kBits / 4; ++i)
          slot.words[b][i] =
              load_once(words_ + b * (Layout<kBits>::kBandWords / 4) + i * kWarpSize);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          slot.scales[g][b][0] = load_scale(scales_ + g * second_ + b * kBand);
          slot.scales[g][b][1] = load_scale(scales_ + g * second_ + b * kBand + 8);
        }
      }
    }
    words_ += Layout<kBits>::kTileWords / 4;
    if (--group_left_ == 0) {
      scales_ += kGroups * walk_.scale_stride;
      group_left_ = kGroups == 1 ? walk_.tiles_a_group : 1;
    }
    if (--tiles_left_ == 0) {
      band_ += step_;
      enter();
    }
  }

 private:
  __device__ __forceinline__ void enter() {
    constexpr unsigned kBandsOfTile = kTile / kBand;
    const auto band = static_cast<unsigned>(band_);
    words_ = first_words_ +
             int64_t{band / kBandsOfTile} * walk_.k_tiles * (Layout<kBits>::kTileWords / 4) +
             band % kBandsOfTile * (Layout<kBits>::kBandWords / 4);
    scales_ = first_scales_ + band_ * kBand;
    tiles_left_ = tiles_;
    group_left_ = first_left_;
  }

  const Walk& walk_;
  const uint4* const first_words_;  // this lane's, in band 0
  const uint16_t* const first_scales_;
  const int tiles_, first_left_, second_, step_;
  int band_, tiles_left_ = 0, group_left_ = 0;
  const uint4* words_ = nullptr;
  const uint16_t* scales_ = nullptr;
};

// --- arithmetic ------------------------------------------------------------------------------------

// With x in bf16 scales are bf16 (`fits`); with fp16 they are either.
template <typename T>
__device__ __forceinline__ float scale_of(uint32_t stored, bool is_bf16) {
  const auto bits = static_cast<uint16_t>(stored);
  if (std::is_same_v<T, bf16> || is_bf16) return to_float(bf16{bits});
  return to_float(fp16{bits});
}

template <int kTiles>
struct Accumulators {
  float v[kTiles][4] = {};
};

// One tile of K, for the bands of a warp: codes exactly, scales in fp32 at the end of a group.
template <int kBits, typename S, int kGroups, typename T>
__device__ __forceinline__ void multiply_tile(const Slot<kBits, S::kBands, kGroups>& slot,
                                              const uint4* x, int m, bool is_bf16,
                                              Accumulators<S::kTiles> (&total)[S::kBands]) {
  const int lane = threadIdx.x % kWarpSize;
  // With few products a block, two chains of them: each waits for the one before.
  constexpr int kChains = kGroups == 1 && S::kParts == 1 ? 2 : 1;
  Accumulators<S::kTiles> chains[kChains][S::kBands];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Accumulators<S::kTiles>(&group)[S::kBands] = chains[half % kChains];
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
    if (half == 0 && kGroups == 1) continue;
    constexpr int kLast = kGroups - 1;
#pragma unroll
    for (int band = 0; band < S::kBands; ++band) {
      const float low = scale_of<T>(slot.scales[half * kLast][band][0], is_bf16);
      const float high = scale_of<T>(slot.scales[half * kLast][band][1], is_bf16);
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float other = kChains == 2 ? chains[0][band].v[j][i] : 0.0f;
          total[band].v[j][i] += (i < 2 ? low : high) * (group[band].v[j][i] + other);
          group[band].v[j][i] = 0.0f;
        }
      }
    }
  }
}

// --- the end of a band: sums of all warps, and of all blocks of a cluster ---------------------------

// Part p of the sums (a band and 8 rows of x) is added up in block p % cluster of the cluster.
// [place of p there][warp of the cluster][lane]
template <typename S>
__device__ __forceinline__ void share_sums(const Accumulators<S::kTiles> (&total)[S::kBands],
                                           int cluster, float4* sums) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float4* const mine = sums + (cluster_rank() * S::kWarps + warp) * kWarpSize + lane;
#pragma unroll
  for (int p = 0; p < S::kParts; ++p) {
    const float(&v)[4] = total[p / S::kTiles].v[p % S::kTiles];
    store_to_block(mine + p / cluster * cluster * S::kThreads, {v[0], v[1], v[2], v[3]},
                   p % cluster, cluster);
  }
}

// Out of line: it stands in the unrolled loop as often as there are slots, and code that is run
// once a band must not push the rest out of the instruction caches.
template <typename S, typename T>
__device__ __noinline__ void finish_parts(const Call<T>& call, int cluster, int band, int turn,
                                          const float4* sums) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int rank = static_cast<int>(cluster_rank());
  const int sources = cluster * S::kWarps;
  // Turn by turn another warp has the work.
  for (int place = (warp + turn) % S::kWarps; place * cluster + rank < S::kParts;
       place += S::kWarps) {
    float sum[4] = {};
#pragma unroll 4
    for (int source = 0; source < sources; ++source) {
      const float4 v = sums[(place * sources + source) * kWarpSize + lane];
      sum[0] += v.x;
      sum[1] += v.y;
      sum[2] += v.z;
      sum[3] += v.w;
    }
#pragma unroll
    for (float& s : sum) s *= 1.0f / Fraction<T>::kValue;
    const int p = place * cluster + rank;
    const int64_t row = int64_t{band + p / S::kTiles} * kBand + lane / 4;
    const int64_t columns = call.columns();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t m = p % S::kTiles * 8 + lane % 4 * 2 + i;
      if (m >= call.problem.m) break;
      T* const out = call.out + m * columns;
      const float low = call.biased(sum[i], row), high = call.biased(sum[i + 2], row + 8);
      if (call.swiglu) {
        const int64_t column = swiglu_column(row);
        if (column < columns) out[column] = call.finished(swiglu(low, high), m, column);
      } else {
        if (row < columns) out[row] = call.finished(low, m, row);
        if (row + 8 < columns) out[row + 8] = call.finished(high, m, row + 8);
      }
    }
  }
}

// --- the kernel -------------------------------------------------------------------------------------

template <int kBits, typename S, int kGroups, typename T>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    decode_kernel(const __grid_constant__ Call<T> call, const __grid_constant__ Walk walk) {
  GRACE_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / kWarpSize, rank = static_cast<int>(cluster_rank());
  const int block_first = walk.k_tiles * rank / walk.cluster;
  const int tiles = walk.k_tiles * (rank + 1) / walk.cluster - block_first;
  const int first = block_first + tiles * warp / S::kWarps;
  const int last = block_first + tiles * (warp + 1) / S::kWarps;
  const int step = static_cast<int>(gridDim.x) / walk.cluster * S::kBands;
  int band = static_cast<int>(blockIdx.x) / walk.cluster * S::kBands;

  constexpr int kAhead = S::kAhead * 4 / kBits;  // the same bytes whatever the width
  Slot<kBits, S::kBands, kGroups> slots[kAhead];
  Loader<kBits, S::kBands, kGroups> loader(walk, call.qweight, call.scales.data, first, last, band,
                                           step);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) loader.next(slots[i]);

  wait_for_previous_kernel();
  const int sum_bytes = S::sum_bytes(walk.cluster);
  float4* const sums = reinterpret_cast<float4*>(shared);  // twice, in turns
  uint4* const x = reinterpret_cast<uint4*>(shared + 2 * sum_bytes);
  load_x<S::kTiles, S::kThreads>(call.x, walk, block_first, tiles, x);
  cluster_barrier(walk.cluster);  // also: every block runs before another writes to it

  constexpr int kXTile = S::kTiles * 2 * kWarpSize;
  const uint4* const first_x = x + (first - block_first) * kXTile;
  const uint4* tile_x = first_x;
  Accumulators<S::kTiles> total[S::kBands];
  int tile = first, turn = 0;
  while (band < walk.bands) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      multiply_tile<kBits, S, kGroups, T>(slots[i], tile_x, walk.m, call.scales.is_bf16, total);
      loader.next(slots[i]);
      tile_x += kXTile;
      if (++tile == last) {
        float4* const here = sums + turn % 2 * (sum_bytes / 16);
        share_sums<S>(total, walk.cluster, here);
        cluster_barrier(walk.cluster);
        finish_parts<S>(call, walk.cluster, band, turn, here);
#pragma unroll
        for (int b = 0; b < S::kBands; ++b) total[b] = {};
        tile = first;
        tile_x = first_x;
        band += step;
        ++turn;
        if (band >= walk.bands) break;
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
  return 2 * S::sum_bytes(cluster) + ceil_div<int64_t>(p.k_tiles, cluster) * S::kTiles * kXTileBytes;
}

template <typename S, typename T>
bool fits(const Call<T>& call, int cluster, const Device& device) {
  const Problem& p = call.problem;
  const bool groups = p.group_size % kTile == 0 || p.group_size == kTile / 2;
  const bool aligned = p.k % (kTile / 2) == 0 && reinterpret_cast<uintptr_t>(call.x) % 4 == 0;
  return p.m <= S::kTiles * 8 && groups && aligned && !call.scales.is_float &&
         p.k_tiles < 1 << 16 && (call.scales.is_bf16 || std::is_same_v<T, fp16>)&& p.k_tiles >= int64_t{cluster} * S::kWarps &&
         (cluster == 1 || device.capability >= 90) &&
         shared_bytes<S>(p, cluster) * S::kBlocksPerSm + 1024 * (S::kBlocksPerSm - 1) <=
             device.shared_bytes;
}

template <int kBits, typename S, typename T>
void launch_decode(const Call<T>& call, int cluster, int device) {
  const Problem& p = call.problem;
  const Device& d = Device::of(device);
  const auto i = [](int64_t x) { return static_cast<int>(x); };
  const int64_t bands = p.n_tiles * (kTile / kBand);
  const Walk walk{i(p.m),
                  i(p.k),
                  i(p.k_tiles),
                  i(bands),
                  i(p.groups()),
                  i(call.scales.stride),
                  cluster,
                  i(std::max<int64_t>(1, p.group_size / kTile))};
  const int64_t most = d.processors * S::kBlocksPerSm / cluster;
  const auto clusters = static_cast<unsigned>(std::min(bands / S::kBands, most));
  LaunchShape shape{clusters * cluster, S::kThreads,
                    static_cast<size_t>(shared_bytes<S>(p, cluster))};
  shape.dependent = d.capability >= 90;
  shape.cluster = static_cast<unsigned>(cluster);
  if (p.group_size < kTile) {
    launch(decode_kernel<kBits, S, 2, T>, shape, device, call, walk);
  } else {
    launch(decode_kernel<kBits, S, 1, T>, shape, device, call, walk);
  }
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
