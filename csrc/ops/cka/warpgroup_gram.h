// Products of Grams by wgmma, for images with fewer rows than both widths together. A thread block
// makes a tile of a couple (warpgroup_tiles.h). Of a tile that it makes whole it has both models'
// sums, K and L, and finishes it (warpgroup_strip.h); parts of tiles that are cut it leaves in
// slots, which a second kernel adds up in order and finishes.
#pragma once

#include "ops/cka/warpgroup_strip.h"

namespace grace::cka::warpgroup {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A tile's sums in a slot: fragment f of block (row, column), a float4 a thread.

__device__ __forceinline__ float4* slot_block(const Arguments& x, int slot, int row, int column) {
  float* const at = x.slots + int64_t{slot} * kTile * kTile;
  return reinterpret_cast<float4*>(at) + (row * kSide + column) * (kBlock / 8) * kGroup +
         threadIdx.x % kGroup;
}

// --- the kernel of products ---

// What a cluster has to do: the stages [first, last) of both models of a couple.
struct Work {
  Couple couple;
  int first, last;
  int number;  // of the couple among those that are cut, -1 for a whole one
  int part;
};

// Calls f(work) for all work of this cluster; by whole warps.
template <bool kBackward, typename F>
__device__ __forceinline__ void walk(const Arguments& x, const Schedule& schedule, const F& f) {
  const int cluster = static_cast<int>(blockIdx.x) / kCluster;
  const auto call = [&](const Work& work) {
    const bool any = wanted<kBackward>(work.couple.tile(0), x) ||
                     (work.couple.two && wanted<kBackward>(work.couple.tile(1), x));
    if (any) f(work);
  };
  for (int i = cluster; i < schedule.whole; i += x.clusters)
    call({couple_at(x, i), 0, schedule.stages, -1, 0});
  if (cluster >= schedule.cut * schedule.parts) return;
  const int number = cluster % schedule.cut, part = cluster / schedule.cut;
  call({couple_at(x, schedule.whole + number), schedule.begin(part), schedule.begin(part + 1),
        number, part});
}

// Calls f(model, first, stages) for the stages of a model that the work has.
template <typename F>
__device__ __forceinline__ void by_model(const Schedule& schedule, const Work& work, const F& f) {
  const int middle = min(max(schedule.student_stages, work.first), work.last);
  if (work.first < middle) f(0, work.first, middle - work.first);
  if (middle < work.last) f(1, middle - schedule.student_stages, work.last - middle);
}

// By the warp that copies. The rows that both tiles share come to both thread blocks.
__device__ __forceinline__ void copy_rows(const Maps& maps, const Arguments& x, Ring& ring,
                                          const Couple& couple, int rank, int model, int first,
                                          int stages) {
  const Tile tile = couple.tile(rank);
  const int begin = x.images.bound(tile.image.image);
  const int shared = couple.share_rows ? tile.i : tile.j, own = couple.share_rows ? tile.j : tile.i;
  const int count = tile.side(shared);
  const int own_count = tile.on_diagonal() || !couple.has(rank) ? 0 : tile.side(own);
  const int shared_at = couple.share_rows ? 0 : kOperandBytes, own_at = kOperandBytes - shared_at;
  const CUtensorMap& map = maps.rows[model];
  for (int stage = first; stage < first + stages; ++stage, ring.next()) {
    wait_for(ring.empty(), ring.parity() ^ 1);
    warp_expect_bytes(ring.full(), (count + own_count) * kBlockBytes);
    if (ring.turn() == rank)
      for (int i = 0; i < count; ++i)
        warp_copy_box_to(3, ring.stage() + shared_at + i * kBlockBytes, map, stage * kDepth,
                         begin + shared * kTile + i * kBlock, ring.full());
    for (int i = 0; i < own_count; ++i)
      warp_copy_box(ring.stage() + own_at + i * kBlockBytes, map, stage * kDepth,
                    begin + own * kTile + i * kBlock, ring.full());
  }
}

// A warpgroup's row of blocks of a tile: those on and above the diagonal.
struct RowOfBlocks {
  int row;
  int first, count;  // of its columns; none if the tile has no such row
  int a_at, b_at;    // of its operands, in a stage

  __device__ __forceinline__ RowOfBlocks(const Couple& couple, int rank, int group) : row(group) {
    const Tile tile = couple.tile(rank);
    const bool none = !couple.has(rank) || group >= tile.rows();
    first = tile.on_diagonal() ? group : 0;
    count = none ? 0 : tile.columns() - first;
    a_at = (tile.on_diagonal() && !couple.share_rows ? kOperandBytes : 0) + group * kBlockBytes;
    b_at = (tile.on_diagonal() && couple.share_rows ? 0 : kOperandBytes) + first * kBlockBytes;
  }
};

__device__ __forceinline__ void multiply(float (&d)[kSide * 32], Ring& ring, int stages,
                                         const RowOfBlocks& row) {
  const auto unchanged = [](int, uint32_t) {};
#pragma unroll
  for (int i = 0; i < kSide * 32; ++i) d[i] = 0.0f;
  if (row.count == 3)
    return multiply_stages<192, false>(d, ring, stages, 0, row.a_at, row.b_at, unchanged);
  if (row.count == 2)
    return multiply_stages<128, false>(d, ring, stages, 0, row.a_at, row.b_at, unchanged);
  if (row.count == 1)
    return multiply_stages<64, false>(d, ring, stages, 0, row.a_at, row.b_at, unchanged);
  skip_stages(ring, stages);
}

__device__ __forceinline__ void store_row(const Arguments& x, int slot, const RowOfBlocks& row,
                                          const float (&d)[kSide * 32]) {
#pragma unroll
  for (int block = 0; block < kSide; ++block) {
    if (block >= row.count) break;
    float4* const to = slot_block(x, slot, row.row, row.first + block);
#pragma unroll
    for (int f = 0; f < kBlock / 8; ++f) {
      const float* const from = d + block * 32 + f * 4;
      to[f * kGroup] = {from[0], from[1], from[2], from[3]};
    }
  }
}

__device__ __forceinline__ void read_strip(Strip& v, const float4* from) {
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    const float4 four = from[f * kGroup];
    v[f][0] = four.x, v[f][1] = four.y, v[f][2] = four.z, v[f][3] = four.w;
  }
}

// Calls finish(k, l, place) for the strips of a row of blocks: L in registers, K in a slot.
template <typename Finish>
__device__ __forceinline__ void finish_row(const Arguments& x, const Tile& tile, int slot,
                                           const RowOfBlocks& row, const float (&d)[kSide * 32],
                                           const Finish& finish) {
  const int n = x.images.length(tile.image.image);
#pragma unroll
  for (int strip = 0; strip < kSide * 2; ++strip) {
    if (strip / 2 >= row.count) break;
    Strip k, l;
    read_strip(k, slot_block(x, slot, row.row, row.first + strip / 2) + strip % 2 * 4 * kGroup);
#pragma unroll
    for (int f = 0; f < 4; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e) l[f][e] = d[strip * 16 + f * 4 + e];
    const Place place = {tile.i * kSide + row.row, tile.j * kSide + row.first + strip / 2,
                         strip % 2};
    unscale(k, x, 0, n, place);
    unscale(l, x, 1, n, place);
    finish(k, l, place);
  }
}

// The tile's three sums, those of its first strip; none of the others.
__device__ __forceinline__ void write_tile_sums(const Arguments& x, const Tile& tile,
                                                const float (&sums)[3], float* scratch) {
  for (int i = 0; i < 3; ++i) {
    const float total = warp_sum(sums[i]);
    if (threadIdx.x % kWarpSize == 0)
      scratch[i * kMultiplierWarps + threadIdx.x / kWarpSize] = total;
  }
  multipliers_barrier();
  float* const to = x.sums + int64_t{tile.number()} * kStrips * 3;
  if (threadIdx.x < kStrips * 3) {
    float total = 0.0f;
    if (threadIdx.x < 3)
      for (int i = 0; i < kMultiplierWarps; ++i)
        total += scratch[threadIdx.x * kMultiplierWarps + i];
    to[threadIdx.x] = total;
  }
  multipliers_barrier();
}

// Behind the slots of cut couples.
__device__ __forceinline__ int own_slot(const Arguments& x) {
  return cut_slots(x.clusters) + static_cast<int>(blockIdx.x);
}

// By the warps that multiply.
template <bool kBackward>
__device__ __forceinline__ void make_tile(const Arguments& x, const Schedule& schedule,
                                          const Work& work, int rank, Ring& ring, float* scratch) {
  const RowOfBlocks row(work.couple, rank, uniform_warp() / 4);
  const Tile tile = work.couple.tile(rank);
  const bool whole = work.number < 0;
  float d[kSide * 32];
  by_model(schedule, work, [&](int model, int, int stages) {
    multiply(d, ring, stages, row);
    if (whole && model == 1) return;
    store_row(x, whole ? own_slot(x) : schedule.slot(work.number, rank, work.part, model), row, d);
  });
  if (!whole || !work.couple.has(rank) || !wanted<kBackward>(tile, x)) return;
  if constexpr (kBackward) {
    const Weigh weigh(x, tile);
    finish_row(
        x, tile, own_slot(x), row, d,
        [&](const Strip& k, const Strip& l, const Place& place) { weigh.write(k, l, place); });
  } else {
    float sums[3] = {};
    finish_row(
        x, tile, own_slot(x), row, d,
        [&](const Strip& k, const Strip& l, const Place& place) { add_sums(sums, k, l, place); });
    write_tile_sums(x, tile, sums, scratch);
  }
}

#endif

template <bool kBackward>
__global__ void __launch_bounds__(kThreads, 1)
    gram_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments x) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  GRACE_DYNAMIC_SHARED(shared);
  __shared__ float scratch[3 * kMultiplierWarps];
  Ring ring = make_ring(shared);
  wait_for_previous_kernel();
  const Schedule schedule = schedule_of(x);
  const int rank = static_cast<int>(cluster_rank());
  const int warp = uniform_warp();
  if (warp >= kMultiplierWarps) {
    give_registers();
    if (warp == kMultiplierWarps)
      walk<kBackward>(x, schedule, [&](const Work& work) {
        by_model(schedule, work, [&](int model, int first, int stages) {
          copy_rows(maps, x, ring, work.couple, rank, model, first, stages);
        });
      });
  } else {
    take_registers();
    walk<kBackward>(x, schedule, [&](const Work& work) {
      make_tile<kBackward>(x, schedule, work, rank, ring, scratch);
    });
  }
  cluster_barrier(kCluster);  // the other one may still fetch for both, and free stages in both
#endif
}

// --- the kernel that finishes what is cut ---

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A strip of a model's sums, of all parts that have stages of it.
__device__ __forceinline__ void add_slots(Strip& sums, const Arguments& x, const Schedule& schedule,
                                          int couple, int rank, int model, int block, int half) {
  const int last = schedule.last_part(model);
#pragma unroll 8
  for (int part = schedule.first_part(model); part <= last; ++part) {
    const float4* const from =
        slot_block(x, schedule.slot(couple, rank, part, model), block / kSide, block % kSide) +
        half * 4 * kGroup;
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const float4 v = from[f * kGroup];
      sums[f][0] += v.x, sums[f][1] += v.y, sums[f][2] += v.z, sums[f][3] += v.w;
    }
  }
}

#endif

// A strip a thread block, of a tile of a couple that is cut.
template <bool kBackward>
__global__ void __launch_bounds__(kGroup) cut_kernel(const __grid_constant__ Arguments x) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ float scratch[kGroup / kWarpSize];
  wait_for_previous_kernel();
  const Schedule schedule = schedule_of(x);
  const int number = static_cast<int>(blockIdx.x) / 2, rank = static_cast<int>(blockIdx.x) % 2;
  if (number >= schedule.cut) return;
  const Couple couple = couple_at(x, schedule.whole + number);
  const Tile tile = couple.tile(rank);
  if (!couple.has(rank) || !wanted<kBackward>(tile, x)) return;

  const int block = static_cast<int>(blockIdx.y) / 2, half = static_cast<int>(blockIdx.y) % 2;
  const int row = block / kSide, column = block % kSide;
  const bool needed =
      row < tile.rows() && column < tile.columns() && !(tile.on_diagonal() && column < row);
  Strip k = {}, l = {};
  const Place place = {tile.i * kSide + row, tile.j * kSide + column, half};
  if (needed) {
    const int n = x.images.length(tile.image.image);
    add_slots(k, x, schedule, number, rank, 0, block, half);
    add_slots(l, x, schedule, number, rank, 1, block, half);
    unscale(k, x, 0, n, place);
    unscale(l, x, 1, n, place);
  }
  if constexpr (kBackward) {
    if (needed) Weigh(x, tile).write(k, l, place);
  } else {
    float sums[3] = {};
    if (needed) add_sums(sums, k, l, place);
    float* const to = x.sums + (int64_t{tile.number()} * kStrips + blockIdx.y) * 3;
    for (int i = 0; i < 3; ++i) {
      const float total = block_sum<kGroup>(sums[i], scratch);
      if (threadIdx.x == 0) to[i] = total;
    }
  }
#endif
}

}  // namespace grace::cka::warpgroup
