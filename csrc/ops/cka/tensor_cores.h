// Launches for 16-bit inputs: Grams, features and the gradient on tensor cores.
#pragma once

#include "ops/cka/direction.h"
#include "ops/cka/feature.h"
#include "ops/cka/gram.h"
#include "ops/cka/launches.h"
#include "ops/cka/warpgroup.h"

namespace grace::cka {
namespace {

#if defined(GRACE_EMULATE)  // small, so that tests reach what is beyond
constexpr int kMostBlocks = 3, kMostWeights = 6;
#else
constexpr int kMostBlocks = 528;    // of gram_kernel: four after another on an H200
constexpr int kMostWeights = 1024;  // tiles of W in memory, 36 KiB each
#endif
constexpr int kMostRound = 256;
constexpr int kManyRounds = 16;

// A block an image: the sums of its pairs or of its products, in a fixed order, and CKA.
template <typename Gram>
__global__ void __launch_bounds__(kThreads)
    value_kernel(const __grid_constant__ Gram gram,
                 const __grid_constant__ FeatureArguments feature, Values values) {
  __shared__ float scratch[kWarps];
  wait_for_previous_kernel();
  const int image = blockIdx.x;
  float own[3] = {};
  if (feature.is_feature(image)) {
    const float* from = feature.sums + int64_t{feature.slot_of(image)} * feature.tiles();
    const int ends[] = {feature.cross_tiles(),
                        feature.cross_tiles() + pairs_of(feature.student_tiles()), feature.tiles()};
    for (int which = 0; which < 3; ++which)
      for (int i = (which == 0 ? 0 : ends[which - 1]) + static_cast<int>(threadIdx.x);
           i < ends[which]; i += kThreads)
        own[which] += from[i];
  } else {
    const Sums sums = sums_of(gram, image);
#pragma unroll 4
    for (int i = threadIdx.x; i < sums.count; i += kThreads)
      for (int which = 0; which < 3; ++which) own[which] += sums.at[i * 3 + which];
  }
  const float hsic[] = {block_sum<kThreads>(own[0], scratch), block_sum<kThreads>(own[1], scratch),
                        block_sum<kThreads>(own[2], scratch)};
  if (threadIdx.x == 0) values.write(image, hsic);
}

GramArguments gram_arguments(const Kept& kept, int student_width, int teacher_width,
                             const Images& images) {
  GramArguments x = {};
  x.student = data<fp16>(kept.student);
  x.teacher = data<fp16>(kept.teacher);
  x.student_width = student_width;
  x.teacher_width = teacher_width;
  x.images = images;
  x.along = data<float>(kept.stats) + images.rows;
  return x;
}

FeatureArguments feature_arguments(const GramArguments& gram) {
  FeatureArguments x = {};
  x.student = gram.student;
  x.teacher = gram.teacher;
  x.student_width = gram.student_width;
  x.teacher_width = gram.teacher_width;
  x.images = gram.images;
  x.saved = gram.saved;
  return x;
}

// What the pairs of a call come to in the worst case of its images' lengths.
struct GramPlan {
  int most_tiles;  // along a side of a Gram
  int tiles;       // rows of tiles of all images
  int pairs;
  Sharing sharing;

  int parts() const { return pairs > 0 && sharing.most > 0 ? 3 * sharing.round : 0; }
};

GramPlan gram_plan(const GramArguments& x, int device) {
  GramPlan plan = {};
  const int widths = x.student_width + x.teacher_width - 1;
  const int longest = x.images.rows < widths ? x.images.rows : widths;
  plan.most_tiles = ceil_div(longest, kTile);
  plan.tiles = (x.images.rows + (kTile - 1) * x.images.count) / kTile;
  plan.pairs = static_cast<int>(int64_t{plan.tiles} * (plan.most_tiles + 1) / 2);
  const int round = multiprocessors(device);
  plan.sharing.round = round < 2 ? 2 : (round < kMostRound ? round : kMostRound);
  plan.sharing.whole = most_shared_bytes(device) >= kGramBytes;
  // Among so many the remainder is little, and where memory is most wanted this saves some.
  const bool many = plan.sharing.whole && plan.pairs > kManyRounds * plan.sharing.round;
  plan.sharing.most = many ? 0 : plan.sharing.round / 2;
  return plan;
}

template <bool kBackward>
void launch_parts(const GramArguments& x, const GramPlan& plan, const Sharing& sharing,
                  int device) {
  const int pairs = plan.pairs < sharing.most ? plan.pairs : sharing.most;
  launch(part_kernel<kBackward>, following(dim3(plan.parts()), kGroup, kTileBytes), device, x,
         sharing);
  launch(part_sum_kernel<kBackward>, following(dim3(pairs, kSlices), kThreads), device, x, sharing);
}

template <bool kBackward>
void launch_gram(const GramArguments& x, const GramPlan& plan, const Tensor& parts, int device) {
  if (plan.pairs == 0) return;
  Sharing sharing = plan.sharing;
  sharing.parts = data<float>(parts);
  if (!sharing.whole) {
    for (; sharing.first < plan.pairs; sharing.first += sharing.most)
      launch_parts<kBackward>(x, plan, sharing, device);
    return;
  }
  if (plan.pairs > sharing.most) {  // else few enough to be shared, all of them
    const int blocks = plan.pairs < kMostBlocks ? plan.pairs : kMostBlocks;
    launch(gram_kernel<kBackward>, following(dim3(blocks), kThreads, kGramBytes), device, x,
           sharing);
  }
  if (sharing.most > 0) launch_parts<kBackward>(x, plan, sharing, device);
}

#if defined(GRACE_WITH_SM90A) && !defined(GRACE_EMULATE)

bool has_wgmma(int device) {
  return Device::of(device).capability == 90 && multiprocessors(device) >= 2 * warpgroup::kCluster;
}

warpgroup::Arguments warpgroup_arguments(const GramArguments& x) {
  warpgroup::Arguments to = {};
  to.widths[0] = x.student_width;
  to.widths[1] = x.teacher_width;
  to.images = x.images;
  to.saved = x.saved;
  to.along = x.along;
  return to;
}

#endif

// The values, once the Grams' sums are made.
template <typename Gram>
void finish_values(const Gram& gram, FeatureArguments feature, const Values& values,
                   const Tensor& like) {
  const int device = device_of(like);
  Tensor sums = empty_float(like, {int64_t{feature.slots()} * feature.tiles()});
  feature.sums = data<float>(sums);
  launch(
      feature_kernel<false>,
      following(dim3(feature.tiles(), static_cast<unsigned>(feature.slots())), kGroup, kTileBytes),
      device, feature);
  launch(value_kernel<Gram>, following(dim3(values.images.count), kThreads), device, gram, feature,
         values);
}

void launch_values(GramArguments gram, const Values& values, const Tensor& like) {
  const int device = device_of(like);
  const FeatureArguments feature = feature_arguments(gram);
#if defined(GRACE_WITH_SM90A) && !defined(GRACE_EMULATE)
  if (has_wgmma(device)) {
    warpgroup::Arguments x = warpgroup_arguments(gram);
    const warpgroup::Plan plan = warpgroup::plan_of(x, multiprocessors(device));
    Tensor slots = empty_float(like, {int64_t{plan.slots()} * warpgroup::kTile * warpgroup::kTile});
    Tensor sums = empty_float(like, {int64_t{plan.pairs} * warpgroup::kStrips * 3});
    x.slots = data<float>(slots);
    x.sums = data<float>(sums);
    x.most_pairs = plan.pairs;
    x.clusters = plan.clusters;
    if (x.images.rows > 0)
      warpgroup::launch_gram<false>(warpgroup::maps_of(gram.student, gram.teacher, x), x, plan,
                                    device);
    return finish_values(x, feature, values, like);
  }
#endif
  const GramPlan plan = gram_plan(gram, device);
  Tensor parts = empty_float(like, {int64_t{plan.parts()} * kTile * kTile});
  Tensor sums = empty_float(like, {int64_t{plan.pairs} * kSlices * 3});
  gram.sums = data<float>(sums);
  gram.most_pairs = plan.pairs;
  launch_gram<false>(gram, plan, parts, device);
  finish_values(gram, feature, values, like);
}

// Gradients of images in Gram form, and of rows in no image: window after window of W. Those after
// the first are mostly for nobody: their pairs are not shared, for two launches less.
template <typename T>
void launch_direction(DirectionArguments<T> x, GramPlan plan, const Tensor& weights,
                      const Tensor& parts, int device) {
  const int most = plan.tiles * plan.most_tiles;
  const auto columns = static_cast<unsigned>(ceil_div(x.gram.student_width, kTile));
  const Images& images = x.gram.images;
  const int tile_rows = images.piece_bound<kTile>();
  x.gram.most_pairs = plan.pairs;
  Weights& w = x.gram.weights;
  w.at = data<unsigned char>(weights);
  w.capacity = most < 1 ? 1 : (most < kMostWeights ? most : kMostWeights);
  for (; w.window == 0 || w.window * w.capacity < most; ++w.window) {
    if (w.window > 0 && plan.sharing.whole) plan.sharing.most = 0;
    launch_gram<true>(x.gram, plan, parts, device);
    const int outside = w.window == 0 ? ceil_div(images.rows, kTile) : 0;
    launch(direction_kernel<T>, following(dim3(tile_rows + outside, columns), kGroup, kTileBytes),
           device, x);
  }
}

template <typename T>
void launch_feature_direction(FeatureArguments x, const DirectionArguments<T>& direction,
                              int device) {
  const auto columns = static_cast<unsigned>(x.student_tiles());
  const int tile_rows = x.images.piece_bound<kTile>();
  for (x.slot = 0; x.slot < x.slots(); ++x.slot) {
    launch(feature_kernel<true>,
           following(dim3(x.cross_tiles() + pairs_of(x.student_tiles())), kGroup, kTileBytes),
           device, x);
    launch(feature_direction_kernel, following(dim3(tile_rows, columns), kGroup, kTileBytes),
           device, x, reinterpret_cast<fp16*>(direction.out));
  }
  if (x.slots() > 0)
    launch(feature_normalization_kernel<T>,
           following(dim3(ceil_div(x.images.rows, kWarps)), kThreads), device, x, direction.student,
           direction.inverse, direction.grad, direction.out);
}

int64_t product_bytes(const FeatureArguments& feature) {
  if (feature.slots() == 0) return 0;
  return int64_t{feature.widths()} * kept_pitch(feature.student_width) * 2;
}

// Of W with the row of tiles that a window ends in.
int64_t weight_bytes(const GramPlan& plan) {
  const int64_t most = int64_t{plan.tiles} * plan.most_tiles;
  return (most <= kMostWeights ? most : int64_t{kMostWeights} + plan.most_tiles) * kWeightBytes;
}

// Memory for the one, then for the other.
Tensor room_for(int64_t bytes, int64_t others, const Tensor& like) {
  return empty_float(like, {ceil_div<int64_t>(bytes > others ? bytes : others, 4)});
}

#if defined(GRACE_WITH_SM90A) && !defined(GRACE_EMULATE)

// The gradients of images in Gram form; returns memory for the others' products.
template <typename T>
Tensor warpgroup_direction(const DirectionArguments<T>& from, const Kept& kept, int64_t others) {
  const Tensor& like = kept.stats;
  const int device = device_of(like);
  warpgroup::Arguments gram = warpgroup_arguments(from.gram);
  const warpgroup::Plan plan = warpgroup::plan_of(gram, multiprocessors(device));
  Tensor slots = empty_float(like, {int64_t{plan.slots()} * warpgroup::kTile * warpgroup::kTile});
  Tensor shares = empty_float(like, {plan.window() * warpgroup::kShares * warpgroup::kTile});
  Tensor room = room_for(plan.window() * warpgroup::kPanel * 2, others, like);
  gram.slots = data<float>(slots);
  gram.panels.at = data<fp16>(room);
  gram.panels.shares = data<float>(shares);
  gram.most_pairs = plan.pairs;
  gram.clusters = plan.clusters;
  const bool fours =
      from.gram.student_width % 4 == 0 && reinterpret_cast<uintptr_t>(from.out) % 8 == 0;
  if (gram.images.rows > 0)
    warpgroup::launch_direction<T>(
        warpgroup::maps_of(from.gram.student, from.gram.teacher, gram),
        {gram, data<float>(kept.means), from.inverse, from.grad, from.out, fours}, plan, device);
  return room;
}

#endif

// The same by mma.sync.
template <typename T>
Tensor direction(const DirectionArguments<T>& x, const Kept& kept, int64_t others) {
  const Tensor& like = kept.stats;
  const int device = device_of(like);
#if defined(GRACE_WITH_SM90A) && !defined(GRACE_EMULATE)
  if (has_wgmma(device)) return warpgroup_direction(x, kept, others);
#endif
  const GramPlan plan = gram_plan(x.gram, device);
  Tensor room = room_for(weight_bytes(plan), others, like);
  Tensor parts = empty_float(like, {int64_t{plan.parts()} * kTile * kTile});
  launch_direction<T>(x, plan, room, parts, device);
  return room;
}

template <typename T>
void backward_tensor_cores(const Tensor& grad, const Tensor& student, const Kept& kept,
                           const Tensor& saved, const Images& images, int teacher_width,
                           const Tensor& out) {
  GramArguments gram =
      gram_arguments(kept, static_cast<int>(student.size(1)), teacher_width, images);
  gram.saved = data<float>(saved);
  FeatureArguments feature = feature_arguments(gram);
  const DirectionArguments<T> x = {gram,
                                   data<T>(student),
                                   data<float>(kept.stats),
                                   data<float>(grad),
                                   data<T>(out),
                                   wide_rows(student) && wide_rows(out)};
  Tensor room = direction(x, kept, product_bytes(feature));
  feature.products = data<fp16>(room);
  launch_feature_direction<T>(feature, x, device_of(student));
}

}  // namespace
}  // namespace grace::cka
