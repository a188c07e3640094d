// dequant_gemm for few rows of x by mma.sync, sm_80 and later. decode.h says how the work is split.
#include "common/mma.h"
#include "ops/dequant_gemm/decode.h"

namespace grace::dequant_gemm {
namespace {

// A row of x in shared memory: whole tiles, and 16 bytes that shift the next row's banks so that
// the eight rows of a fragment are read without conflicts.
GRACE_HOST_DEVICE constexpr int row_bytes(int tiles) { return tiles * kTile * 2 + 16; }

// --- x into shared memory ------------------------------------------------------------------------

// The block's tiles of K, zeros beyond k. K is a multiple of 8.
template <int kThreads, typename T>
__device__ __forceinline__ void load_x(const T* x, const Walk& walk, int first, int tiles,
                                       unsigned char* shared) {
  constexpr int kChunk = 16 / sizeof(T);
  for (int i = threadIdx.x; i < tiles * (kTile / kChunk); i += kThreads) {
    const int column = first * kTile + i * kChunk;
    const bool inside = column < walk.k;
    const T* const from = x + (inside ? column : 0);
#pragma unroll 4
    for (int m = 0; m < walk.m; ++m)
      copy_chunk(shared + m * row_bytes(tiles) + i * 16, from + int64_t{m} * walk.k, inside);
  }
  copies_done();
}

// --- arithmetic ---

// One tile of K, for the bands of a warp: codes exactly, scales in fp32 at the end of a group.
template <int kBits, typename S, int kGroups, typename T>
__device__ __forceinline__ void multiply_tile(const Slot<kBits, S::kBands, kGroups>& slot,
                                              const unsigned char* (&x)[S::kTiles], bool is_bf16,
                                              Accumulators<S::kTiles> (&total)[S::kBands]) {
  // With few products a block, two chains of them: each waits for the one before.
  constexpr int kChains = kGroups == 1 && S::kParts == 1 ? 2 : 1;
  Accumulators<S::kTiles> chains[kChains][S::kBands];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Accumulators<S::kTiles>(&group)[S::kBands] = chains[half % kChains];
    uint32_t fragments[S::kTiles][4];  // of x: 32 columns of 8 rows each
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) load_fragments<false>(fragments[j], x[j] + half * kTile);
#pragma unroll
    for (int band = 0; band < S::kBands; ++band) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(slot.words[band]);
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        uint32_t a[4];
        decode_fractions<kBits, T>(words + (half * 2 + block) * Layout<kBits>::kBlockWords, a);
#pragma unroll
        for (int j = 0; j < S::kTiles; ++j) {
          const uint32_t b[2] = {fragments[j][block * 2], fragments[j][block * 2 + 1]};
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

// --- the kernel ----------------------------------------------------------------------------------

template <int kBits, typename S, int kGroups, typename T>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    decode_kernel(const __grid_constant__ Call<T> call, const __grid_constant__ Walk walk) {
  GRACE_DYNAMIC_SHARED(shared);
  const Place place(walk.team);
  const int block_first = walk.k_tiles * place.rank / walk.cluster;
  const int tiles = walk.k_tiles * (place.rank + 1) / walk.cluster - block_first;
  const int first = block_first + tiles * place.warp / walk.team;
  const int last = block_first + tiles * (place.warp + 1) / walk.team;
  const int teams = S::kWarps / walk.team, clusters = static_cast<int>(gridDim.x) / walk.cluster;
  // Teams of one block are far apart, so that bands left over go to different blocks.
  const int step = clusters * teams * S::kBands;
  int band = (place.team * clusters + static_cast<int>(blockIdx.x) / walk.cluster) * S::kBands;

  constexpr int kAhead = S::kAhead * 4 / kBits;  // the same bytes whatever the width
  Slot<kBits, S::kBands, kGroups> slots[kAhead];
  Loader<kBits, S::kBands, kGroups> loader(walk, call.qweight, call.scales.data, first, last, band,
                                           step);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) loader.next(slots[i]);

  Barriers* const barriers = reinterpret_cast<Barriers*>(shared);
  float4* const sums = reinterpret_cast<float4*>(shared + kBarrierBytes<S>);  // twice, in turns
  const int sum_bytes = S::sum_bytes(walk.cluster);
  unsigned char* const x = shared + kBarrierBytes<S> + 2 * sum_bytes;
  init_barriers<S>(barriers, walk);
  wait_for_previous_kernel();
  load_x<S::kThreads>(call.x, walk, block_first, tiles, x);
  cluster_barrier(walk.cluster);  // also: every block runs before another writes to it

  // This lane's chunks of x for load_fragments. Where x has fewer rows the last one stands for
  // them: what comes of it is not written.
  const unsigned char *first_x[S::kTiles], *tile_x[S::kTiles];
#pragma unroll
  for (int j = 0; j < S::kTiles; ++j) {
    const int row = std::min(j * 8 + place.lane % 8, walk.m - 1);
    first_x[j] =
        x + row * row_bytes(tiles) + (first - block_first) * kTile * 2 + place.lane / 8 * 16;
    tile_x[j] = first_x[j];
  }

  Accumulators<S::kTiles> total[S::kBands];
  int left = last - first, turn = 0;
  while (band < walk.bands) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      multiply_tile<kBits, S, kGroups, T>(slots[i], tile_x, call.scales.is_bf16, total);
      loader.next(slots[i]);
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) tile_x[j] += kTile * 2;
      if (--left == 0) {
        float4* const here =
            sums + turn % 2 * (sum_bytes / 16) + sum_bytes / 16 / teams * place.team;
        share_sums<S>(total, walk, place, turn, barriers + place.team, here);
        finish_parts<S>(call, walk, band, turn, barriers + place.team, here);
#pragma unroll
        for (int b = 0; b < S::kBands; ++b) total[b] = {};
#pragma unroll
        for (int j = 0; j < S::kTiles; ++j) tile_x[j] = first_x[j];
        left = last - first;
        band += step;
        ++turn;
        if (band >= walk.bands) break;
      }
    }
  }
#if defined(GRACE_EMULATE)
  const int turns = ceil_div(walk.bands - static_cast<int>(blockIdx.x) * S::kBands, step);
  for (; turn < turns; ++turn) team_barrier(place, walk.team);
#endif
  if (walk.cluster > 1) cluster_barrier(walk.cluster);  // nobody writes to a block that has left
}

// --- variants ------------------------------------------------------------------------------------

using Few = Shape<1, 1, 16, 8>;      // up to 8 rows of x
using FewPairs = Shape<1, 2, 8, 8>;  // two bands at once: half the reads of x
using More = Shape<2, 1, 16, 7>;     // up to 16
using MorePairs = Shape<2, 2, 8, 8>;
using Most = Shape<4, 1, 16, 4>;  // up to 32
using MostPairs = Shape<4, 2, 8, 7>;
using FewHalf = Shape<1, 1, 8, 8, 2>;  // two blocks a multiprocessor: the next kernel starts early

// Calls f(shape, split) with what a variant's number stands for:
// 16 * shape + 4 * log2(cluster) + log2(teams of a block).
template <typename F>
bool with_variant(int variant, F&& f) {
  const auto call = [&](auto shape) {
    return f(shape, Split{1 << variant / 4 % 4, decltype(shape)::kWarps >> variant % 4});
  };
  switch (variant / 16) {
    case 0:
      return call(Few{});
    case 1:
      return call(FewPairs{});
    case 2:
      return call(More{});
    case 3:
      return call(MorePairs{});
    case 4:
      return call(Most{});
    case 5:
      return call(MostPairs{});
    case 6:
      return call(FewHalf{});
    default:
      return false;
  }
}
constexpr int kVariants = 7 * 16;

template <typename S>
int64_t shared_bytes(const Problem& p, int cluster) {
  const auto tiles = static_cast<int>(ceil_div<int64_t>(p.k_tiles, cluster));
  return kBarrierBytes<S> + 2 * S::sum_bytes(cluster) + p.m * row_bytes(tiles);
}

template <typename S, typename T>
bool fits(const Call<T>& call, const Split& split, const Device& device) {
  const Problem& p = call.problem;
  const int64_t shared = (shared_bytes<S>(p, split.cluster) + 1024) * S::kBlocksPerSm - 1024;
  return p.m <= S::kTiles * 8 && readable(call) && split.team > 0 &&
         p.k_tiles >= int64_t{split.cluster} * split.team &&
         (split.cluster == 1 || device.capability >= 90) && shared <= device.shared_bytes;
}

template <int kBits, typename S, typename T>
void launch_decode(const Call<T>& call, const Split& split, int device) {
  const Walk walk = walk_of(call, split);
  const auto shape = shape_of<S>(walk, shared_bytes<S>(call.problem, split.cluster),
                                 Device::of(device), call.settled);
  if (call.problem.group_size < kTile) {
    launch(decode_kernel<kBits, S, 2, T>, shape, device, call, walk);
  } else {
    launch(decode_kernel<kBits, S, 1, T>, shape, device, call, walk);
  }
}

}  // namespace

int decode_variants() { return kVariants; }

template <int kBits, typename T>
bool decode_runs(const Call<T>& call, int variant, int device) {
  return with_variant(variant, [&](auto shape, const Split& split) {
    return fits<decltype(shape)>(call, split, Device::of(device));
  });
}

template <int kBits, typename T>
void decode(const Call<T>& call, int variant, int device) {
  with_variant(variant, [&](auto shape, const Split& split) {
    launch_decode<kBits, decltype(shape)>(call, split, device);
    return true;
  });
}

#define GRACE_INSTANTIATE(bits, T)                           \
  template bool decode_runs<bits>(const Call<T>&, int, int); \
  template void decode<bits>(const Call<T>&, int, int);
GRACE_INSTANTIATE(4, bf16)
GRACE_INSTANTIATE(4, fp16)
GRACE_INSTANTIATE(8, bf16)
GRACE_INSTANTIATE(8, fp16)
#undef GRACE_INSTANTIATE

}  // namespace grace::dequant_gemm
