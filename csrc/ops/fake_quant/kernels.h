// The kernels of fake_quant and fake_quant_many, forward and backward, for one weight or for many
// in one launch.
//
// Three ways to share groups among lanes, by the group's length (way_of):
//
//   kTiles      4 to 32 vectors of 16 bytes, a power of two: a lane a vector. A warp takes 128
//               vectors in a row, four a lane, all in flight at once, while every lane makes the
//               scale of another group: exp in double precision once a group, not once a lane.
//   kRows       any other number of whole vectors: up to 32 lanes walk along a group.
//   kElements   anything else, and tensors off the 16-byte grid: a warp a group.
//
// Sums of the scale's gradient stay in registers: a lane's elements in order, then lanes by halves.
#pragma once

#include "ops/fake_quant/batch.h"
#include "ops/fake_quant/vector.h"

namespace grace::fake_quant {

// --- tiles ---------------------------------------------------------------------------------------

// Where a lane of a warp stands: its vectors are first + pass * 32, of groups pass * step apart.
template <typename T>
struct TilePlace {
  int64_t first;  // vector of this lane in pass 0
  int64_t count;  // vectors of the part
  int64_t group;  // first group of the tile
  int shift, lane;

  template <typename O>
  __device__ TilePlace(const Part<T, O>& part, unsigned block)
      : shift(part.shift), lane(threadIdx.x % kWarpSize) {
    const int64_t tile = int64_t{block} * kWarps + threadIdx.x / kWarpSize;
    first = tile * kTileVectors + lane;
    count = part.groups << shift;
    group = tile * kTileVectors >> shift;
  }

  __device__ bool has(int pass) const { return first + pass * kWarpSize < count; }
  __device__ int64_t element(int pass) const { return (first + pass * kWarpSize) * kPerVector<T>; }
  // Of this lane's vector in this pass, counted from the tile's first group.
  __device__ int group_in_tile(int pass) const { return (pass * kWarpSize + lane) >> shift; }
  __device__ int groups() const { return kTileVectors >> shift; }
  __device__ bool leads() const { return (lane & ((1 << shift) - 1)) == 0; }

  template <typename E>
  __device__ void load(const E* from, Packed<T, E> (&to)[kPasses]) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      to[pass] = has(pass) ? load_packed<T>(from + element(pass)) : Packed<T, E>{};
  }
};

// The scale of one of the tile's groups: every lane has another one.
template <typename T, typename O>
__device__ __forceinline__ Divisor own_divisor(const Part<T, O>& part, const TilePlace<T>& place,
                                               ScaleGrid grid) {
  const int64_t group = place.group + place.lane;
  const bool mine = place.lane < place.groups() && group < part.groups;
  return divisor_of(mine ? scale_of(__ldg(part.log_scale + group), grid) : 1.0f);
}

__device__ __forceinline__ Divisor shuffled(const Divisor& own, int lane) {
  return {__shfl_sync(kFullWarp, own.scale, lane), __shfl_sync(kFullWarp, own.reciprocal, lane),
          __shfl_sync(kFullWarp, own.rest, lane)};
}

template <typename T, typename O, int kMost>
__global__ void __launch_bounds__(kThreads)
    tiles_kernel(const __grid_constant__ Batch<T, O, kMost> batch) {
  const int i = batch.part_of(blockIdx.x);
  const Part<T, O>& part = batch.parts[i];
  const TilePlace<T> place(part, blockIdx.x - batch.first_block[i]);

  uint4 weight[kPasses];
  place.load(part.weight, weight);
  const Divisor own = own_divisor(part, place, batch.grid);

#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const Divisor by = shuffled(own, place.group_in_tile(pass));
    const Packed<T, O> result = quantized<T, O>(weight[pass], by, batch.codes);
    if (place.has(pass)) store_packed(part.quantized() + place.element(pass), result);
  }
}

template <typename T, typename O, int kMost>
__global__ void __launch_bounds__(kThreads)
    tiles_backward_kernel(const __grid_constant__ Batch<T, O, kMost> batch) {
  const int i = batch.part_of(blockIdx.x);
  const Part<T, O>& part = batch.parts[i];
  const TilePlace<T> place(part, blockIdx.x - batch.first_block[i]);

  uint4 weight[kPasses];
  Packed<T, O> grad[kPasses];
  place.load(part.weight, weight);
  place.load(part.grad, grad);
  const Divisor own = own_divisor(part, place, batch.grid);

#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int group = place.group_in_tile(pass);
    const VectorGradient g =
        gradient<T, O>(grad[pass], weight[pass], shuffled(own, group), batch.codes);
    const float sum = sum_over_lanes(g.log_scale, part.lanes());
    if (!place.has(pass)) continue;
    store_vector(part.grad_weight() + place.element(pass), g.weight);
    if (place.leads()) part.grad_log_scale[place.group + group] = sum;
  }
}

// --- rows ----------------------------------------------------------------------------------------

// A lane's way along its group: every `lanes`-th vector.
template <typename T>
struct RowPlace {
  int lanes, lane, vectors;
  int64_t group;
  bool inside;

  template <typename O>
  __device__ RowPlace(const Part<T, O>& part, unsigned block)
      : lanes(part.lanes()), lane(threadIdx.x & (lanes - 1)), vectors(part.vectors()) {
    group = (int64_t{block} * kThreads + threadIdx.x) >> part.shift;
    inside = group < part.groups;
  }

  __device__ int64_t element(int vector) const {
    return (group * vectors + vector) * kPerVector<T>;
  }

  // The next vectors of this lane, from `first` on.
  template <typename E>
  __device__ void load(const E* from, int first, Packed<T, E> (&to)[kPasses]) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int vector = first + pass * lanes;
      to[pass] = vector < vectors ? load_packed<T>(from + element(vector)) : Packed<T, E>{};
    }
  }
};

template <typename T, typename O, int kMost>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const __grid_constant__ Batch<T, O, kMost> batch) {
  const int i = batch.part_of(blockIdx.x);
  const Part<T, O>& part = batch.parts[i];
  const RowPlace<T> place(part, blockIdx.x - batch.first_block[i]);
  if (!place.inside) return;

  const Divisor by = divisor_of(scale_of(__ldg(part.log_scale + place.group), batch.grid));
  for (int first = place.lane; first < place.vectors; first += kPasses * place.lanes) {
    uint4 weight[kPasses];
    place.load(part.weight, first, weight);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int vector = first + pass * place.lanes;
      const Packed<T, O> result = quantized<T, O>(weight[pass], by, batch.codes);
      if (vector < place.vectors) store_packed(part.quantized() + place.element(vector), result);
    }
  }
}

template <typename T, typename O, int kMost>
__global__ void __launch_bounds__(kThreads)
    rows_backward_kernel(const __grid_constant__ Batch<T, O, kMost> batch) {
  const int i = batch.part_of(blockIdx.x);
  const Part<T, O>& part = batch.parts[i];
  const RowPlace<T> place(part, blockIdx.x - batch.first_block[i]);

  float sum = 0.0f;
  const float theta = place.inside ? __ldg(part.log_scale + place.group) : 0.0f;
  const Divisor by = divisor_of(scale_of(theta, batch.grid));
  const int end = place.inside ? place.vectors : 0;  // all lanes go on to the sum
  for (int first = place.lane; first < end; first += kPasses * place.lanes) {
    uint4 weight[kPasses];
    Packed<T, O> grad[kPasses];
    place.load(part.weight, first, weight);
    place.load(part.grad, first, grad);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int vector = first + pass * place.lanes;
      if (vector >= place.vectors) continue;
      const VectorGradient g = gradient<T, O>(grad[pass], weight[pass], by, batch.codes);
      store_vector(part.grad_weight() + place.element(vector), g.weight);
      sum += g.log_scale;
    }
  }
  sum = sum_over_lanes(sum, place.lanes);
  if (place.inside && place.lane == 0) part.grad_log_scale[place.group] = sum;
}

// --- elements ------------------------------------------------------------------------------------

template <typename T, typename O, int kMost>
__global__ void __launch_bounds__(kThreads)
    elements_kernel(const __grid_constant__ Batch<T, O, kMost> batch) {
  const int part_index = batch.part_of(blockIdx.x);
  const Part<T, O>& part = batch.parts[part_index];
  const unsigned block = blockIdx.x - batch.first_block[part_index];
  const int64_t group = int64_t{block} * kWarps + threadIdx.x / kWarpSize;
  if (group >= part.groups) return;
  const float scale = scale_of(part.log_scale[group], batch.grid);
  for (int i = threadIdx.x % kWarpSize; i < part.group_size; i += kWarpSize) {
    const int64_t at = group * part.group_size + i;
    part.quantized()[at] =
        from_float<O>(fake_quantize(to_float(part.weight[at]), scale, batch.codes));
  }
}

template <typename T, typename O, int kMost>
__global__ void __launch_bounds__(kThreads)
    elements_backward_kernel(const __grid_constant__ Batch<T, O, kMost> batch) {
  const int part_index = batch.part_of(blockIdx.x);
  const Part<T, O>& part = batch.parts[part_index];
  const unsigned block = blockIdx.x - batch.first_block[part_index];
  const int64_t group = int64_t{block} * kWarps + threadIdx.x / kWarpSize;
  if (group >= part.groups) return;
  const float scale = scale_of(part.log_scale[group], batch.grid);
  float sum = 0.0f;
  for (int i = threadIdx.x % kWarpSize; i < part.group_size; i += kWarpSize) {
    const int64_t at = group * part.group_size + i;
    const float g = to_float(part.grad[at]), w = to_float(part.weight[at]);
    const Gradient one = gradient_of(g, w, scale, batch.codes);
    part.grad_weight()[at] = from_float<T>(one.weight);
    sum += one.log_scale;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) part.grad_log_scale[group] = sum;
}

// --- launch --------------------------------------------------------------------------------------

template <typename T, typename O, int kMost>
auto kernel_of(Way way, bool backward) {
  if (way == Way::kTiles)
    return backward ? tiles_backward_kernel<T, O, kMost> : tiles_kernel<T, O, kMost>;
  if (way == Way::kRows)
    return backward ? rows_backward_kernel<T, O, kMost> : rows_kernel<T, O, kMost>;
  return backward ? elements_backward_kernel<T, O, kMost> : elements_kernel<T, O, kMost>;
}

// Quantizes parts that go the same way, up to kMost of them; with gradients, the backward.
template <int kMost, typename T, typename O>
void launch_parts(const Part<T, O>* parts, int count, Way way, Codes codes, ScaleGrid grid,
                  int device) {
  static_assert(sizeof(Batch<T, O, kMost>) <= 4096, "kernel arguments of every toolkit fit 4 KB");
  Batch<T, O, kMost> batch = {};
  batch.count = count;
  batch.codes = codes;
  batch.grid = grid;
  unsigned blocks = 0;
  for (int i = 0; i < count; ++i) {
    batch.parts[i] = parts[i];
    batch.first_block[i] = blocks;
    blocks += static_cast<unsigned>(ceil_div(parts[i].groups, groups_per_block(parts[i], way)));
  }
  const bool backward = parts[0].grad != nullptr;
  launch(kernel_of<T, O, kMost>(way, backward), {dim3(blocks), kThreads}, device, batch);
}

}  // namespace grace::fake_quant
