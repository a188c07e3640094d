// Products of Grams, for images with fewer rows than both widths together: pairs of tile rows (i,
// j), i <= j, of both models' Grams K and L. Forward, three sums of a pair leave the chip.
// Backward, a pair leaves W = (n / |L|) (L - ratio K), whose elements are near 1, at (i, j) and
// turned at (j, i).
//
// Two ways to the same pair: one block has both models, a group of warps each (many pairs), or
// blocks share a pair's depth and leave parts that another kernel adds in order (few pairs).
#pragma once

#include "ops/cka/rows.h"
#include "ops/cka/tile_product.h"

namespace grace::cka {

constexpr int kSlice = 32;  // rows of a pair's tiles that are finished at a time
constexpr int kSlices = kTile / kSlice;

// W lies by tiles: kTile x kTile of fp16, then in kShares parts the sums along each row of W times
// the products of unit and centered rows, which the normalization's gradient asks for.
constexpr int kShares = 8;
constexpr int kWeightBytes = kTile * kTile * 2 + kShares * kTile * 4;

struct Weights {
  unsigned char* at;
  int window;    // the one that is in memory
  int capacity;  // tiles of a window; the row of tiles that is begun in it is finished behind it

  __device__ __forceinline__ fp16* tile(int64_t number) const {
    return reinterpret_cast<fp16*>(at + (number - int64_t{window} * capacity) * kWeightBytes);
  }
  __device__ __forceinline__ float* along(int64_t number) const {
    return reinterpret_cast<float*>(tile(number) + kTile * kTile);
  }
  // Whether a row of tiles that begins with `number` is in memory.
  __device__ __forceinline__ bool has(int64_t number) const { return number / capacity == window; }
};

struct GramArguments {
  const fp16* student;  // kept rows
  const fp16* teacher;
  int student_width;
  int teacher_width;
  Images images;
  float* sums;  // forward: [most_pairs, slices, 3]
  int most_pairs;
  // backward
  const float* saved;  // [images, kSavedColumns]
  const float* along;  // [rows]
  Weights weights;

  __device__ __forceinline__ int tiles(int image) const {
    const int n = images.length(image);
    return n < student_width + teacher_width ? (n + kTile - 1) / kTile : 0;
  }
};

GRACE_HOST_DEVICE int pairs_of(int tiles) { return tiles * (tiles + 1) / 2; }

__device__ __forceinline__ int warp_total(int x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Pairs and tiles of W of the images before `image`; by whole warps.
struct Before {
  int pairs;
  int weights;
};

__device__ __forceinline__ Before before(const GramArguments& x, int image) {
  Before own = {0, 0};
  for (int i = threadIdx.x % kWarpSize; i < image; i += kWarpSize) {
    const int tiles = x.tiles(i);
    own.pairs += pairs_of(tiles);
    own.weights += tiles * tiles;
  }
  return {warp_total(own.pairs), warp_total(own.weights)};
}

// Three sums each of so many parts of an image's Grams.
struct Sums {
  const float* at;
  int count;
};

__device__ __forceinline__ Sums sums_of(const GramArguments& x, int image) {
  const int first = before(x, image).pairs, own = pairs_of(x.tiles(image));
  const int left = first < x.most_pairs ? x.most_pairs - first : 0;
  return {x.sums + int64_t{first} * kSlices * 3, (own < left ? own : left) * kSlices};
}

struct Pair {
  int image;  // -1 for a number beyond the last
  int i, j;
  int tiles;    // along each side
  int weights;  // of the images before

  __device__ __forceinline__ int64_t weight(int row, int column) const {
    return weights + int64_t{row} * tiles + column;
  }
};

// The pair of a number: 32 images at a time, a lane each.
__device__ __forceinline__ Pair pair_of(int number, const GramArguments& x) {
  const int lane = threadIdx.x % kWarpSize;
  int weights = 0;
  for (int first = 0; first < x.images.count; first += kWarpSize) {
    const int tiles = first + lane < x.images.count ? x.tiles(first + lane) : 0;
    int pairs = pairs_of(tiles), squares = tiles * tiles;  // up to and with this lane's
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int more = __shfl_sync(kFullWarp, pairs, lane - step);
      const int wider = __shfl_sync(kFullWarp, squares, lane - step);
      if (lane >= step) pairs += more, squares += wider;
    }
    const int found = warp_total(pairs <= number ? 1 : 0);
    if (found < kWarpSize) {
      const int t = __shfl_sync(kFullWarp, tiles, found);
      int rest = number - __shfl_sync(kFullWarp, pairs, found) + pairs_of(t), i = 0;
      for (; rest >= t - i; ++i) rest -= t - i;
      const int before = weights + __shfl_sync(kFullWarp, squares, found) - t * t;
      return {first + found, i, i + rest, t, before};
    }
    number -= __shfl_sync(kFullWarp, pairs, kWarpSize - 1);
    weights += __shfl_sync(kFullWarp, squares, kWarpSize - 1);
  }
  return {-1, 0, 0, 0, 0};
}

// Whether this launch has to make the pair.
template <bool kBackward>
__device__ __forceinline__ bool wanted(const Pair& pair, const GramArguments& x) {
  if (pair.image < 0) return false;
  if constexpr (!kBackward) return true;
  if (x.saved[pair.image * kSavedColumns + kCounted] == 0.0f) return false;
  return x.weights.has(pair.weight(pair.i, 0)) || x.weights.has(pair.weight(pair.j, 0));
}

// The rows of tile `index` of the image, over `depth` columns from `first` on.
__device__ __forceinline__ Operand gram_operand(const GramArguments& x, int model, int image,
                                                int index, int first, int depth) {
  const int pitch = kept_pitch(model == 0 ? x.student_width : x.teacher_width);
  const int left = x.images.length(image) - index * kTile;
  const int64_t row = x.images.bound(image) + index * kTile;
  return plain((model == 0 ? x.student : x.teacher) + row * pitch + first, pitch,
               left < kTile ? left : kTile, depth < pitch - first ? depth : pitch - first);
}

// kSlice rows of a pair's tiles of K and L in shared memory, not yet divided by the rows' scales.
struct Slice {
  const float* k;
  const float* l;
  float k_scale, l_scale;

  __device__ __forceinline__ float student(int row, int column) const {
    return k[row * kSharedPitch + column] * k_scale;
  }
  __device__ __forceinline__ float teacher(int row, int column) const {
    return l[row * kSharedPitch + column] * l_scale;
  }
};

__device__ __forceinline__ Slice slice_of(const GramArguments& x, const float* k, const float* l) {
  const float s = row_scale(x.student_width), t = row_scale(x.teacher_width);
  return {k, l, 1.0f / (s * s), 1.0f / (t * t)};
}

// A thread's part of the slice's sums; what is above the diagonal counts twice.
__device__ __forceinline__ void add_sums(float (&sums)[3], const Slice& slice, float weight) {
  const int row = threadIdx.x / 8;
#pragma unroll
  for (int i = 0; i < kTile / 8; ++i) {
    const int column = i / 4 * 32 + threadIdx.x % 8 * 4 + i % 4;
    const float k = slice.student(row, column), l = slice.teacher(row, column);
    sums[kHsicBoth] += weight * k * l;
    sums[kHsicStudent] += weight * k * k;
    sums[kHsicTeacher] += weight * l * l;
  }
}

// W of a slice of the pair: how to make one element of it.
struct Weighing {
  float ratio;
  float scale;

  __device__ __forceinline__ float operator()(float k, float l) const {
    return (l - ratio * k) * scale;
  }
};

__device__ __forceinline__ Weighing weighing_of(const GramArguments& x, int image) {
  const float* kept = x.saved + image * kSavedColumns;
  const auto n = static_cast<float>(x.images.length(image));
  return {kept[kHsicBoth] / kept[kHsicStudent], n / sqrtf(kept[kHsicTeacher])};
}

// ⟨mean, centered row⟩ of a row of tile `index`; 0 beyond the image.
__device__ __forceinline__ float along_of(const GramArguments& x, int image, int index, int row) {
  const int at = index * kTile + row;
  return at < x.images.length(image) ? x.along[x.images.bound(image) + at] : 0.0f;
}

// W(i, j): eight threads have a row, four neighbours at a time.
__device__ __forceinline__ void write_weights(const GramArguments& x, const Pair& pair, int slice,
                                              const Slice& values, const Weighing& weigh) {
  const int row = threadIdx.x / 8, share = threadIdx.x % 8;
  fp16* const to = x.weights.tile(pair.weight(pair.i, pair.j)) + (slice * kSlice + row) * kTile;
  float along = 0.0f;
#pragma unroll
  for (int part = 0; part < kTile / 32; ++part) {
    fp16 four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = part * 32 + share * 4 + i;
      const float k = values.student(row, column), w = weigh(k, values.teacher(row, column));
      along += w * (k + along_of(x, pair.image, pair.j, column));
      four[i] = from_float<fp16>(w);
    }
    *reinterpret_cast<uint2*>(to + part * 32 + share * 4) = {
        four[0].bits | uint32_t{four[1].bits} << 16, four[2].bits | uint32_t{four[3].bits} << 16};
  }
  x.weights.along(pair.weight(pair.i, pair.j))[share * kTile + slice * kSlice + row] = along;
}

// W(j, i): a thread has 16 rows of a column of the slice.
__device__ __forceinline__ void write_turned(const GramArguments& x, const Pair& pair, int slice,
                                             const Slice& values, const Weighing& weigh) {
  constexpr int kRows = kSlice * kTile / kThreads;
  const int column = threadIdx.x % kTile, half = threadIdx.x / kTile;
  fp16* const to =
      x.weights.tile(pair.weight(pair.j, pair.i)) + column * kTile + slice * kSlice + half * kRows;
  float along = 0.0f;
#pragma unroll
  for (int part = 0; part < kRows; part += kWide) {
    float eight[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const int row = half * kRows + part + i;
      const float k = values.student(row, column);
      eight[i] = weigh(k, values.teacher(row, column));
      along += eight[i] * (k + along_of(x, pair.image, pair.i, slice * kSlice + row));
    }
    store_eight(to + part, eight);
  }
  x.weights.along(pair.weight(pair.j, pair.i))[(slice * 2 + half) * kTile + column] = along;
}

static_assert(kThreads == 8 * kSlice && kShares == 2 * kSlices && kShares == 8);

__device__ __forceinline__ void write_slice(const GramArguments& x, const Pair& pair, int slice,
                                            const Slice& values) {
  const Weighing weigh = weighing_of(x, pair.image);
  if (x.weights.has(pair.weight(pair.i, 0))) write_weights(x, pair, slice, values, weigh);
  if (pair.i != pair.j && x.weights.has(pair.weight(pair.j, 0)))
    write_turned(x, pair, slice, values, weigh);
}

__device__ __forceinline__ void write_sums(float* to, const float (&sums)[3], float* scratch) {
  for (int i = 0; i < 3; ++i) {
    const float total = block_sum<kThreads>(sums[i], scratch);
    if (threadIdx.x == 0) to[i] = total;
  }
}

constexpr int kGramBytes = 2 * kTileBytes;  // of shared memory

// Finishes a pair whose tiles of K and L lie at the beginnings of the groups' stages.
template <bool kBackward>
__device__ __forceinline__ void finish_pair(const GramArguments& x, const Pair& pair, int number,
                                            const float* tiles, float* scratch) {
  float sums[3] = {};
  for (int slice = 0; slice < kSlices; ++slice) {
    const float* const k = tiles + slice * kSlice * kSharedPitch;
    const Slice values = slice_of(x, k, k + kTileBytes / 4);
    if constexpr (kBackward) {
      write_slice(x, pair, slice, values);
    } else {
      add_sums(sums, values, pair.i == pair.j ? 1.0f : 2.0f);
    }
  }
  if constexpr (kBackward) return;
  float* const to = x.sums + int64_t{number} * kSlices * 3;
  write_sums(to, sums, scratch);
  if (threadIdx.x >= 3 && threadIdx.x < kSlices * 3) to[threadIdx.x] = 0.0f;
}

// How the pairs are launched. `whole`: gram_kernel can be; then `first` is 0. Else part_kernel
// makes all pairs, those from `first` on in this launch.
struct Sharing {
  float* parts;  // [3 round] tiles, in the order of Accumulators
  int round;     // blocks that the GPU has multiprocessors for
  int most;      // pairs that are shared at a time: half a round, or none
  bool whole;
  int first;
};

// Pairs [first, first + count), each made in parts of so many stages.
struct Shared {
  int first;
  int count;
  int student;  // parts
  int teacher;
  int stages;

  GRACE_HOST_DEVICE int parts() const { return student + teacher; }
};

__device__ __forceinline__ Shared shared_pairs(const GramArguments& x, const Sharing& sharing) {
  const int all = before(x, x.images.count).pairs, most = sharing.most;
  const int total = all < x.most_pairs ? all : x.most_pairs;  // images must not overlap, but may
  Shared shared = {};
  if (sharing.whole) {
    const int rest = total % sharing.round;
    shared.count = rest <= most ? rest : 0;
    shared.first = total - shared.count;
  } else {
    const int rest = total - sharing.first;
    shared.count = rest < most ? (rest > 0 ? rest : 0) : most;
    shared.first = sharing.first;
  }
  if (shared.count == 0) return shared;
  const int s = ceil_div(x.student_width, kDepth), t = ceil_div(x.teacher_width, kDepth);
  const auto stages = static_cast<int>(
      ceil_div<int64_t>(int64_t{shared.count} * (s + t), 2 * int64_t{sharing.round}));
  shared.stages = stages < 4 ? 4 : stages;
  shared.student = ceil_div(s, shared.stages);
  shared.teacher = ceil_div(t, shared.stages);
  return shared;
}

// A pair a block, a model a group of warps. There may be more pairs than blocks: those of a number
// beyond the grid follow.
template <bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) gram_kernel(GramArguments x, Sharing sharing) {
  wait_for_previous_kernel();
  GRACE_DYNAMIC_SHARED(shared);
  __shared__ float scratch[kWarps];
  const int model = threadIdx.x / kGroup;
  const int width = model == 0 ? x.student_width : x.teacher_width;
  const int widest = x.student_width > x.teacher_width ? x.student_width : x.teacher_width;
  const int end = shared_pairs(x, sharing).first;
  for (int number = blockIdx.x; number < end; number += gridDim.x) {
    const Pair pair = pair_of(number, x);
    if (!wanted<kBackward>(pair, x)) continue;
    Accumulator tile = {};
    add_product<false, false>(tile, gram_operand(x, model, pair.image, pair.i, 0, width),
                              gram_operand(x, model, pair.image, pair.j, 0, width),
                              pair.i == pair.j, ceil_div(widest, kDepth),
                              shared + model * kTileBytes);
    auto* const tiles = reinterpret_cast<float*>(shared);
    store_tile(tiles + model * kTileBytes / 4, tile);
    __syncthreads();
    finish_pair<kBackward>(x, pair, number, tiles, scratch);
    __syncthreads();  // the next pair's stages overwrite the tiles
  }
}

__device__ __forceinline__ float4* part_of(const Sharing& sharing, int64_t number) {
  return reinterpret_cast<float4*>(sharing.parts + number * kTile * kTile);
}

// A part a block: those of a pair follow each other, the student's first.
template <bool kBackward>
__global__ void __launch_bounds__(kGroup, 2) part_kernel(GramArguments x, Sharing sharing) {
  wait_for_previous_kernel();
  GRACE_DYNAMIC_SHARED(shared);
  const Shared pairs = shared_pairs(x, sharing);
  if (static_cast<int>(blockIdx.x) >= pairs.count * pairs.parts()) return;
  const Pair pair = pair_of(pairs.first + static_cast<int>(blockIdx.x) / pairs.parts(), x);
  if (!wanted<kBackward>(pair, x)) return;
  const int number = static_cast<int>(blockIdx.x) % pairs.parts();
  const int model = number < pairs.student ? 0 : 1;
  const int first = (number - model * pairs.student) * pairs.stages * kDepth;
  const int depth = pairs.stages * kDepth;
  Accumulator tile = {};
  const Operand a = gram_operand(x, model, pair.image, pair.i, first, depth);
  add_product<false, false>(tile, a, gram_operand(x, model, pair.image, pair.j, first, depth),
                            pair.i == pair.j, stages_of(a), shared);
  float4* const to = part_of(sharing, blockIdx.x);
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int j = 0; j < kAcross; ++j)
      to[(i * kAcross + j) * kGroup + threadIdx.x] = {tile[i][j][0], tile[i][j][1], tile[i][j][2],
                                                      tile[i][j][3]};
}

// A slice's fragments of the parts [first, last) added up, into shared memory.
__device__ __forceinline__ void add_parts(const Sharing& sharing, int first, int last, int slice,
                                          float* to) {
  constexpr int kFragments = kSlice * kTile / 4;
  constexpr int kEach = kFragments / kThreads;
  float sums[kEach][4] = {};
  int at[kEach], row[kEach], column[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int f = e * kThreads + threadIdx.x;  // [2 fragments down][kAcross][2 warps][lanes]
    const int thread = slice / 2 * 64 + f % 64, j = f / 64 % kAcross;
    const int i = slice % 2 * 2 + f / (64 * kAcross);
    at[e] = (i * kAcross + j) * kGroup + thread;
    row[e] = fragment_row(i, thread) - slice * kSlice;
    column[e] = fragment_column(j, thread);
  }
#pragma unroll 4
  for (int number = first; number < last; ++number)
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const float4 v = part_of(sharing, number)[at[e]];
      sums[e][0] += v.x, sums[e][1] += v.y, sums[e][2] += v.z, sums[e][3] += v.w;
    }
#pragma unroll
  for (int e = 0; e < kEach; ++e) store_fragment(to, row[e], column[e], sums[e]);
}

// A slice of a pair a block: its parts in order, then as gram_kernel ends.
template <bool kBackward>
__global__ void __launch_bounds__(kThreads) part_sum_kernel(GramArguments x, Sharing sharing) {
  wait_for_previous_kernel();
  __shared__ float4 shared[2][kSlice * kSharedPitch / 4];
  __shared__ float scratch[kWarps];
  const Shared pairs = shared_pairs(x, sharing);
  if (static_cast<int>(blockIdx.x) >= pairs.count) return;
  const int number = pairs.first + static_cast<int>(blockIdx.x), slice = blockIdx.y;
  const Pair pair = pair_of(number, x);
  if (!wanted<kBackward>(pair, x)) return;
  auto* const k = reinterpret_cast<float*>(shared[0]);
  auto* const l = reinterpret_cast<float*>(shared[1]);
  const int first = static_cast<int>(blockIdx.x) * pairs.parts();
  add_parts(sharing, first, first + pairs.student, slice, k);
  add_parts(sharing, first + pairs.student, first + pairs.parts(), slice, l);
  __syncthreads();
  const Slice values = slice_of(x, k, l);
  if constexpr (kBackward) {
    write_slice(x, pair, slice, values);
  } else {
    float sums[3] = {};
    add_sums(sums, values, pair.i == pair.j ? 1.0f : 2.0f);
    write_sums(x.sums + (int64_t{number} * kSlices + slice) * 3, sums, scratch);
  }
}

}  // namespace grace::cka
