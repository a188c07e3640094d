// What the kernels of fake_quant work on: a weight, or a table of weights, and how its groups are
// shared among lanes.
#pragma once

#include "common/vectors.h"
#include "common/warp.h"
#include "ops/fake_quant/fake_quant.h"

namespace grace::fake_quant {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPasses = 4;  // vectors that a lane has in flight, of the weight and of the gradient
constexpr int kTileVectors = kPasses * kWarpSize;

enum class Way { kTiles, kRows, kElements };  // kernels.h describes them

// One weight of T and what becomes of it, quantized to O: [groups, group_size], scales [groups].
template <typename T, typename O>
struct Part {
  const T* weight;
  const float* log_scale;
  const O* grad;          // backward
  void* out;              // the quantized weight, of O; or the weight's gradient, of T
  float* grad_log_scale;  // backward
  int64_t groups;
  int group_size;
  int shift;  // log2 of the lanes that share a group: all that its vectors fill evenly

  GRACE_HOST_DEVICE int vectors() const { return group_size / kPerVector<T>; }
  GRACE_HOST_DEVICE int lanes() const { return 1 << shift; }
  GRACE_HOST_DEVICE O* quantized() const { return static_cast<O*>(out); }
  GRACE_HOST_DEVICE T* grad_weight() const { return static_cast<T*>(out); }
};

// log2 of the largest power of two, up to a warp, that divides the vectors of a group.
template <typename T>
int shift_of(int group_size) {
  const int vectors = group_size / static_cast<int>(kPerVector<T>);
  int shift = 0;
  while (vectors > 0 && (2 << shift) <= kWarpSize && vectors % (2 << shift) == 0) ++shift;
  return shift;
}

template <typename T, typename O>
Way way_of(const Part<T, O>& part) {
  const bool aligned =
      is_vector_aligned(part.weight) && is_vector_aligned(part.out) && is_vector_aligned(part.grad);
  if (part.group_size % kPerVector<T> != 0 || !aligned) return Way::kElements;
  const int vectors = part.vectors();
  const bool tiles = vectors >= kTileVectors / kWarpSize && vectors == part.lanes();
  return tiles ? Way::kTiles : Way::kRows;
}

template <typename T, typename O>
int64_t groups_per_block(const Part<T, O>& part, Way way) {
  if (way == Way::kTiles) return int64_t{kWarps} * kTileVectors / part.vectors();
  return way == Way::kRows ? kThreads / part.lanes() : kWarps;
}

// The weights of one launch, each with blocks of its own.
template <typename T, typename O, int kMost>
struct Batch {
  Part<T, O> parts[kMost];
  unsigned first_block[kMost];
  int count;
  Codes codes;
  ScaleGrid grid;

  // The last part that begins at this block or before it.
  GRACE_HOST_DEVICE int part_of(unsigned block) const {
    int below = 0, above = count;
    while (above - below > 1) {
      const int middle = (below + above) / 2;
      (first_block[middle] <= block ? below : above) = middle;
    }
    return below;
  }
};

}  // namespace grace::fake_quant
