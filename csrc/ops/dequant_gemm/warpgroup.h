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

#include "ops/dequant_gemm/warpgroup_multiply.h"
#include "ops/dequant_gemm/warpgroup_output.h"

namespace grace::dequant_gemm {
namespace {

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
      return f(Shape<64, 1>{}, cluster);
    case 13:
      return f(Shape<176, 2>{}, cluster);
    case 14:
      return f(Shape<192, 2>{}, cluster);
    case 15:
      return f(Shape<32, 1>{}, cluster);
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
         (call.scales.is_bf16 || std::is_same_v<T, fp16>) && p.k_tiles >= 2 * cluster &&
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
  work.bf16_scales = call.scales.is_bf16;
  const int outputs = work.row_tiles * work.token_tiles;
  const auto clusters = static_cast<unsigned>(
      cluster > 1 ? outputs : std::min(outputs, device.processors * S::kBlocks));
  LaunchShape shape{clusters * cluster, S::kThreads,
                    static_cast<size_t>(fixed_bytes<S>(cluster) + work.stages * K::kBytes)};
  shape.dependent = call.settled;
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
