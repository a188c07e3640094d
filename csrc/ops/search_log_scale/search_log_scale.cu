// search_log_scale on CUDA: a warp a group, and its lanes share the candidates.
//
// Every lane judges three candidates on all the group's weights, which pass through shared memory
// 128 at a time: no sum crosses lanes, and a group may be of any length. The weights are read
// twice, once for their largest and once to be judged; the second time they come out of a cache.
#include "common/launch.h"
#include "common/warp.h"
#include "ops/fake_quant/arguments.h"
#include "ops/search_log_scale/search_log_scale.h"

namespace grace::search_log_scale {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChunk = 4 * kWarpSize;  // weights staged at once
constexpr int kEach = (kCandidates + kWarpSize - 1) / kWarpSize;

struct Settings {
  int64_t groups;
  int group_size;
  Codes codes;
  ScaleGrid grid;
};

struct Found {
  float error;
  float log_scale;
  int index;

  // Of two equal ones the first, so that lanes agree.
  __device__ bool better_than(const Found& other) const {
    return error < other.error || (error == other.error && index < other.index);
  }
};

// The largest |w| of the group; NaN where a weight is not finite.
template <typename T>
__device__ float absmax_of(const T* weight, int size) {
  float largest = 0.0f, poison = 0.0f;
  for (int i = threadIdx.x % kWarpSize; i < size; i += kWarpSize) {
    const float w = to_float(weight[i]);
    largest = fmaxf(largest, fabsf(w));
    poison += w * 0.0f;  // NaN of a NaN and of an infinity
  }
  return warp_max(largest) + warp_sum(poison);
}

// The next weights of the group into shared memory; zeros behind its end, which every scale
// represents exactly.
template <typename T>
__device__ void stage(const T* weight, int first, int size, float* staged) {
  __syncwarp();  // lanes may still be reading the last ones
#pragma unroll
  for (int i = threadIdx.x % kWarpSize; i < kChunk; i += kWarpSize)
    staged[i] = first + i < size ? to_float(weight[first + i]) : 0.0f;
  __syncwarp();
}

__device__ __forceinline__ Found best_of_warp(Found mine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Found other = {__shfl_xor_sync(kFullWarp, mine.error, offset),
                         __shfl_xor_sync(kFullWarp, mine.log_scale, offset),
                         __shfl_xor_sync(kFullWarp, mine.index, offset)};
    if (other.better_than(mine)) mine = other;
  }
  return mine;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) search_kernel(const T* weight,   // [groups, group_size]
                                                          float* log_scale,  // [groups]
                                                          Settings s) {
  alignas(16) __shared__ float buffers[kWarps][kChunk];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t group = int64_t{blockIdx.x} * kWarps + warp;
  if (group >= s.groups) return;
  weight += group * s.group_size;
  float* staged = buffers[warp];

  const float absmax = absmax_of(weight, s.group_size);
  float thetas[kEach], sums[kEach] = {};
#pragma unroll
  for (int j = 0; j < kEach; ++j) thetas[j] = candidate(absmax, j * kWarpSize + lane, s.codes);
  const Judge judges[kEach] = {{fake_quant::scale_of(thetas[0], s.grid), s.codes},
                               {fake_quant::scale_of(thetas[1], s.grid), s.codes},
                               {fake_quant::scale_of(thetas[2], s.grid), s.codes}};

  for (int first = 0; first < s.group_size; first += kChunk) {
    stage(weight, first, s.group_size, staged);
    const int left = s.group_size - first;
#pragma unroll 4
    for (int i = 0; i < (left < kChunk ? left : kChunk); i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(staged + i);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        sums[j] = judges[j].add(judges[j].add(sums[j], four.x), four.y);
        sums[j] = judges[j].add(judges[j].add(sums[j], four.z), four.w);
      }
    }
  }

  // Where no scale has a finite error, as beyond float16's range: that of the usual rounding.
  Found best = {INFINITY, log_scale_of(absmax / s.codes.max), kCandidates};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const Found found = {sums[j], thetas[j], j * kWarpSize + lane};
    if (found.index < kCandidates && found.better_than(best)) best = found;
  }
  best = best_of_warp(best);
  if (lane == 0) log_scale[group] = absmax == absmax ? best.log_scale : absmax;
}

// weight [N, K], contiguous; float32 [N, K / group_size], NaN for groups that are not finite.
Tensor search_log_scale_cuda(const Tensor& weight, int64_t bits, int64_t group_size,
                             std::optional<ScalarType> scale_dtype) {
  const int64_t size = group_size == -1 ? weight.size(1) : group_size;
  STD_TORCH_CHECK(size > 0 && weight.size(1) % size == 0,
                  "search_log_scale: group_size must divide the columns of weight");
  const int64_t groups_a_row = weight.size(1) / size;
  Tensor found =
      torch::stable::new_empty(weight, {weight.size(0), groups_a_row}, ScalarType::Float);
  const Settings settings = {weight.size(0) * groups_a_row, static_cast<int>(size),
                             fake_quant::codes_of(static_cast<int>(bits)),
                             fake_quant::grid_of(scale_dtype)};
  if (settings.groups == 0) return found;
  dispatch_floating(weight.scalar_type(), "search_log_scale", [&](auto element) {
    using T = decltype(element);
    launch(search_kernel<T>, {dim3(ceil_div<int64_t>(settings.groups, kWarps)), kThreads},
           device_of(weight), data<const T>(weight), data<float>(found), settings);
  });
  return found;
}

}  // namespace
}  // namespace grace::search_log_scale

GRACE_CUDA_KERNELS(m) {
  m.impl("search_log_scale", TORCH_BOX(&grace::search_log_scale::search_log_scale_cuda));
}
