// What the kernels for few rows of x share, whichever instruction multiplies: a read of the weight
// at the speed of memory.
//
// A team of warps computes bands of 16 rows of the weight, one turn after another. Its slices of
// warps split K; each warp reads its tiles of a band straight into registers as the fragments they
// are, many loads ahead of use, across the end of a turn into the next one. The teams of a block
// share x in shared memory. A team's sums meet in shared memory at the end of a turn. Where x is
// too much for one block, a cluster of blocks splits K again, and their sums meet through each
// other's shared memory.
//
// The split of K depends on the variant and on K alone, so a row of the result does not depend on
// the others, and sums are added in one order.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cluster.h"
#include "common/launch.h"
#include "ops/dequant_gemm/tensor_core.h"

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

// Copies 16 bytes, or zeros if not `inside`, to shared memory; done after copies_done.
template <typename T>
__device__ __forceinline__ void copy_chunk(unsigned char* to, const T* from, bool inside) {
#if defined(GRACE_EMULATE)
  const uint4 zero = {0, 0, 0, 0};
  *reinterpret_cast<uint4*>(to) = inside ? *reinterpret_cast<const uint4*>(from) : zero;
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
#endif
}

__device__ __forceinline__ void copies_done() {
#if !defined(GRACE_EMULATE)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// --- sizes ---------------------------------------------------------------------------------------

template <int kTiles_, int kBands_, int kWarps_, int kAhead_, int kBlocksPerSm_ = 1,
          int kSliceWarps_ = 1>
struct Shape {
  static constexpr int kTiles = kTiles_;  // of 8 rows of x
  static constexpr int kBands = kBands_;  // of 16 rows of the weight, that a warp has in work
  static constexpr int kWarps = kWarps_;
  static constexpr int kAhead = kAhead_;  // tiles of 4-bit codes that a warp loads ahead
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kSliceWarps = kSliceWarps_;  // warps of a team with the same part of K
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kFragments = kBands * kTiles;       // of sums, of a warp
  static constexpr int kTurnBands = kBands * kSliceWarps;  // that a team has in work
  static constexpr int kParts = kFragments * kSliceWarps;  // fragments that a team makes

  // Of the sums that meet in one block: its share of the parts, from all slices of the cluster.
  GRACE_HOST_DEVICE static constexpr int sum_bytes(int cluster) {
    return (kParts + cluster - 1) / cluster * cluster * (kThreads / kSliceWarps) * 16;
  }
};

// What the kernel works with beside the call, in the integers that a GPU is quick with.
struct Walk {
  int m, k, k_tiles, bands, groups, scale_stride;
  int cluster;        // blocks that split K
  int team;           // warps of a team, whose slices split it again: a power of two
  int tiles_a_group;  // unless a tile has two groups
};

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

// --- arithmetic ----------------------------------------------------------------------------------

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

// --- the end of a band: sums of all warps, and of all blocks of a cluster ------------------------

// Part p of the sums (a band and 8 rows of x) is added up in block p % cluster of the cluster, by
// one warp of the team there. Places for them are there twice, for turns to overlap:
//   [turn % 2][team][place p / cluster][warp of the team, in every block of the cluster][lane]
// In one block a barrier says that all are there. In a cluster each turn has two mbarriers:
// `full` counts the bytes that have come, `empty` the parts that were read in the turn before last.
struct Barriers {
  uint64_t full[2], empty[2];
};

template <typename S>
constexpr int kBarrierBytes = S::kWarps * sizeof(Barriers);  // for teams of one warp

// Where a warp stands.
struct Place {
  int lane, team, warp;  // the warp within its team
  int rank;              // of the block in its cluster

  __device__ __forceinline__ explicit Place(int team_warps) {
    lane = threadIdx.x % kWarpSize;
    team = threadIdx.x / kWarpSize / team_warps;
    warp = threadIdx.x / kWarpSize % team_warps;
    rank = static_cast<int>(cluster_rank());
  }
};

__device__ __forceinline__ void team_barrier(const Place& place, int team_warps) {
#if defined(GRACE_EMULATE)
  __syncthreads();  // all teams of a block take part in every turn there
#else
  asm volatile("bar.sync %0, %1;" ::"r"(place.team + 1), "r"(team_warps * kWarpSize) : "memory");
#endif
}

// What a team expects in a turn: its block's parts, from the team's warps in all blocks.
template <typename S>
__device__ __forceinline__ int bytes_of_turn(const Walk& walk, int rank) {
  const int parts = (S::kParts - rank + walk.cluster - 1) / walk.cluster;
  return parts * walk.cluster * (walk.team / S::kSliceWarps) * kWarpSize * 16;
}

template <typename S>
__device__ __forceinline__ void init_barriers(Barriers* barriers, const Walk& walk) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (walk.cluster == 1 || threadIdx.x != 0) return;
  for (int i = 0; i < 2 * S::kWarps / walk.team; ++i) {
    init_barrier(shared_address(&barriers[i / 2].full[i % 2]), 1);
    init_barrier(shared_address(&barriers[i / 2].empty[i % 2]), S::kParts);
  }
  fence_barriers();
  const int bytes = bytes_of_turn<S>(walk, static_cast<int>(cluster_rank()));
  for (int i = 0; i < 2 * S::kWarps / walk.team; ++i)
    expect_bytes(shared_address(&barriers[i / 2].full[i % 2]), bytes);
#endif
}

// Hands this warp's sums to those who add them up: `sums` and `barriers` are the team's.
template <typename S>
__device__ __forceinline__ void share_sums(const Accumulators<S::kTiles> (&total)[S::kBands],
                                           const Walk& walk, const Place& place, int turn,
                                           Barriers* barriers, float4* sums) {
  const int slices = walk.team / S::kSliceWarps, sources = walk.cluster * slices;
  const int first_part = place.warp % S::kSliceWarps * S::kFragments;
  float4* const mine =
      sums + (place.rank * slices + place.warp / S::kSliceWarps) * kWarpSize + place.lane;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (walk.cluster > 1) {
    const int slot = turn % 2;
    if (turn >= 2) wait_for(shared_address(&barriers->empty[slot]), (turn / 2 - 1) % 2);
#pragma unroll
    for (int i = 0; i < S::kFragments; ++i) {
      const float (&v)[4] = total[i / S::kTiles].v[i % S::kTiles];
      const int p = first_part + i, owner = p & (walk.cluster - 1);
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
          "[%5];" ::"r"(address_in(mine + (p / walk.cluster) * sources * kWarpSize, owner)),
          "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(address_in(&barriers->full[slot], owner))
          : "memory");
    }
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < S::kFragments; ++i) {
    const float (&v)[4] = total[i / S::kTiles].v[i % S::kTiles];
    mine[(first_part + i) * sources * kWarpSize] = {v[0], v[1], v[2], v[3]};
  }
  team_barrier(place, walk.team);
}

// Out of line: it stands in the unrolled loop as often as there are slots, and code that is run
// once a band must not push the rest out of the instruction caches.
template <typename S, typename T>
__device__ __noinline__ void finish_parts(const Call<T>& call, const Walk& walk, int band, int turn,
                                          Barriers* barriers, const float4* sums) {
  const Place place(walk.team);
  const int sources = walk.cluster * (walk.team / S::kSliceWarps);
  // Turn by turn another warp has the work.
  for (int i = (place.warp + turn) % walk.team; i * walk.cluster + place.rank < S::kParts;
       i += walk.team) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (walk.cluster > 1) wait_for(shared_address(&barriers->full[turn % 2]), turn / 2 % 2);
#endif
    float sum[4] = {};
#pragma unroll 4
    for (int source = 0; source < sources; ++source) {
      const float4 v = sums[(i * sources + source) * kWarpSize + place.lane];
      sum[0] += v.x;
      sum[1] += v.y;
      sum[2] += v.z;
      sum[3] += v.w;
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (walk.cluster > 1) {
      __syncwarp();
      if (place.lane == 0 && i == 0)
        expect_bytes(shared_address(&barriers->full[turn % 2]), bytes_of_turn<S>(walk, place.rank));
      if (place.lane < walk.cluster)
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                         address_in(&barriers->empty[turn % 2], place.lane))
                     : "memory");
    }
#endif
#pragma unroll
    for (float& s : sum) s *= 1.0f / Fraction<T>::kValue;
    const int part = i * walk.cluster + place.rank;
    write_fragment(call, int64_t{band + part / S::kTiles} * kBand, part % S::kTiles * 8, sum);
  }
}

// --- the host's side -----------------------------------------------------------------------------

// How the warps of a block and the blocks of a cluster split K.
struct Split {
  int cluster, team;
};

template <typename T>
Walk walk_of(const Call<T>& call, const Split& split) {
  const Problem& p = call.problem;
  const auto i = [](int64_t x) { return static_cast<int>(x); };
  return {i(p.m),
          i(p.k),
          i(p.k_tiles),
          i(p.n_tiles * (kTile / kBand)),
          i(p.groups()),
          i(call.scales.stride),
          split.cluster,
          split.team,
          i(std::max<int64_t>(1, p.group_size / kTile))};
}

// As many blocks as run at once, in whole clusters.
template <typename S>
LaunchShape shape_of(const Walk& walk, size_t shared_bytes, const Device& device, bool settled) {
  const int most = device.processors * S::kBlocksPerSm / walk.cluster;
  const auto clusters = static_cast<unsigned>(std::min(walk.bands / S::kTurnBands, most));
  LaunchShape shape{clusters * walk.cluster, S::kThreads, shared_bytes};
  shape.dependent = settled;
  shape.cluster = static_cast<unsigned>(walk.cluster);
  return shape;
}

}  // namespace
}  // namespace grace::dequant_gemm
