// Launches of the kernels that need wgmma, sm_90a: they take the place of gram.h's and
// direction.h's.
#pragma once

#if defined(GRACE_WITH_SM90A) && !defined(GRACE_EMULATE)
#include <algorithm>

#include "ops/cka/warpgroup_direction.h"
#include "ops/cka/warpgroup_gram.h"

namespace grace::cka::warpgroup {

constexpr int kMostPanels = 1536;  // of W in memory, 27 KiB each

// What a call comes to in the worst case of its images' lengths, which is one image with all rows.
struct Plan {
  int clusters;  // that the GPU has multiprocessors for
  int pairs;     // of tiles
  int panels;
  int longest;  // panels of a row of tiles

  int slots() const { return cut_slots(clusters) + kCluster * clusters; }
  int capacity() const {
    return std::clamp(panels, 1, panels <= kMostPanels * 5 / 4 ? panels : kMostPanels);
  }
  // Panels of a window: the row of tiles that is begun in it is finished behind it.
  int64_t window() const { return int64_t{capacity()} + (capacity() < panels ? longest : 0); }
};

inline Plan plan_of(const Arguments& x, int multiprocessors) {
  const int longest = std::min(x.images.rows, x.widths[0] + x.widths[1] - 1);
  const int64_t blocks = ceil_div(longest, kBlock), tiles = ceil_div(longest, kTile);
  const int64_t rows = ceil_div(x.images.rows, kTile) + x.images.count;  // of tiles
  // n rows have at most (n / 192 + 1) (n / 64 + 1) panels.
  const int64_t panels = int64_t{x.images.rows} * longest / (kTile * kBlock) +
                         x.images.rows / kTile + x.images.rows / kBlock + x.images.count;
  return {multiprocessors / kCluster, static_cast<int>(rows * (tiles + 1) / 2),
          static_cast<int>(std::min(panels, rows * blocks)), static_cast<int>(blocks)};
}

inline Maps maps_of(const fp16* student, const fp16* teacher, const Arguments& x) {
  const auto map = [&](const fp16* rows, int width) {
    const auto pitch = static_cast<cuuint64_t>(kept_pitch(width));
    return tensor_map<2>({CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                          rows,
                          {pitch, static_cast<cuuint64_t>(x.images.rows)},
                          {pitch * 2},
                          {kDepth, kBlock},
                          CU_TENSOR_MAP_SWIZZLE_128B});
  };
  return {map(student, x.widths[0]), map(teacher, x.widths[1])};
}

inline LaunchShape of_clusters(const Plan& plan) {
  LaunchShape shape{dim3(plan.clusters * kCluster), dim3(kThreads), kSharedBytes};
  shape.dependent = true;
  shape.cluster = kCluster;
  return shape;
}

template <bool kBackward>
void launch_gram(const Maps& maps, const Arguments& x, const Plan& plan, int device) {
  launch(gram_kernel<kBackward>, of_clusters(plan), device, maps, x);
  LaunchShape shape{dim3(plan.clusters / 2 * kCluster, kStrips), dim3(kGroup)};
  shape.dependent = true;
  launch(cut_kernel<kBackward>, shape, device, x);
}

// Gradients of images in Gram form, and of rows in no image: window after window of W.
template <typename T>
void launch_direction(const Maps& maps, DirectionArguments<T> x, const Plan& plan, int device) {
  Panels& panels = x.gram.panels;
  panels.capacity = plan.capacity();
  for (; panels.window == 0 || panels.window * panels.capacity < plan.panels; ++panels.window) {
    launch_gram<true>(maps, x.gram, plan, device);
    launch(direction_kernel<T>, of_clusters(plan), device, maps, x);
  }
}

}  // namespace grace::cka::warpgroup

#endif
