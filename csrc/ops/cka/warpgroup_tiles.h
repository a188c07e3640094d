// What the kernels of warpgroup.h divide: images into blocks of 64 rows, their Grams into tiles of
// 3 x 3 blocks, and those on and above the diagonals into couples that share a row or a column of
// tiles. A cluster of two thread blocks makes a couple, one tile each, and fetches what they share
// once. All clusters go along the rows' columns in step, so that what they fetch is in the L2
// cache.
//
// Clusters make couples whole while there are couples for all of them. The rest, if it is at most
// half of that, is cut: clusters have equal parts of the depth of both models' rows, the student's
// first, and leave their sums in slots of memory.
#pragma once

#include <climits>

#include "ops/cka/gram.h"

namespace grace::cka::warpgroup {

constexpr int kBlock = 64;
constexpr int kSide = 3;  // blocks along a tile's sides, and warpgroups that multiply
constexpr int kTile = kSide * kBlock;
constexpr int kDepth = 64;     // of a product, a stage
constexpr int kLeastPart = 7;  // stages for which a cluster is worth its slots

// Sums of a strip of a pair of tiles leave together: 64 rows, half a block's columns.
constexpr int kStrips = kSide * kSide * 2;

// W lies by panels: the rows of a tile, the columns of a block, as wgmma's operand a. Beside them,
// for each row, shares of its sum of W times the products of unit and centered rows.
constexpr int kPanel = kTile * kBlock;  // elements
constexpr int kShares = 4;

struct Panels {
  fp16* at;
  float* shares;  // [panels, kShares, kTile]
  int window;     // the one that is in memory
  int capacity;   // panels of a window; the row of tiles that is begun in it is finished behind it

  // Whether a row of tiles that begins with panel `first` is in memory.
  __device__ __forceinline__ bool has(int first) const { return first / capacity == window; }
  __device__ __forceinline__ fp16* panel(int number) const {
    return at + int64_t{number - window * capacity} * kPanel;
  }
  __device__ __forceinline__ float* shares_of(int number) const {
    return shares + int64_t{number - window * capacity} * kShares * kTile;
  }
};

struct Arguments {
  int widths[2];  // of the student's rows and of the teacher's
  Images images;
  float* slots;  // [slots, kTile, kTile]
  int clusters;
  float* sums;  // forward: [most_pairs, kStrips, 3]
  int most_pairs;
  // backward
  const float* saved;  // [images, kSavedColumns]
  const float* along;  // [rows]
  Panels panels;

  __device__ __forceinline__ int blocks(int image) const {
    const int n = images.length(image);
    return n < widths[0] + widths[1] ? (n + kBlock - 1) / kBlock : 0;
  }
  __device__ __forceinline__ int stages(int model) const {
    return (widths[model] + kDepth - 1) / kDepth;
  }
};

// Of an image, or of all images before one.
struct Counts {
  int pairs;    // tiles on and above the diagonal
  int couples;  // of them
  int panels;
  int rows;  // of tiles

  __device__ __forceinline__ Counts& operator+=(const Counts& x) {
    pairs += x.pairs, couples += x.couples, panels += x.panels, rows += x.rows;
    return *this;
  }
};

__device__ __forceinline__ int tiles_of(int blocks) { return (blocks + kSide - 1) / kSide; }

// Couples of neighbours in a row of tiles: each row's first and second, third and fourth …
__device__ __forceinline__ int row_couples(int tiles) { return tiles * tiles / 4; }
// What is left of rows of an odd length are tiles of the last column, every second: (tiles + 1)
// / 2.
__device__ __forceinline__ int left_over(int tiles) { return (tiles + 1) / 2; }

__device__ __forceinline__ Counts counts_of(int blocks) {
  const int tiles = tiles_of(blocks);
  const int couples = row_couples(tiles) + (left_over(tiles) + 1) / 2;
  return {tiles * (tiles + 1) / 2, couples, tiles * blocks, tiles};
}

__device__ __forceinline__ Counts from_lane(const Counts& x, int lane) {
  return {__shfl_sync(kFullWarp, x.pairs, lane), __shfl_sync(kFullWarp, x.couples, lane),
          __shfl_sync(kFullWarp, x.panels, lane), __shfl_sync(kFullWarp, x.rows, lane)};
}

struct Found {
  int image;   // -1 for a number beyond the last
  int blocks;  // of the image
  Counts before;
};

// The image that number `number` of what kKey counts lies in; by whole warps.
template <int Counts::* kKey>
__device__ __forceinline__ Found find(const Arguments& x, int number) {
  const int lane = threadIdx.x % kWarpSize;
  Counts before = {};
  for (int first = 0; first < x.images.count; first += kWarpSize) {
    const int blocks = first + lane < x.images.count ? x.blocks(first + lane) : 0;
    Counts up_to = counts_of(blocks);  // and with this lane's
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const Counts more = from_lane(up_to, lane - step);
      if (lane >= step) up_to += more;
    }
    const int found = __popc(__ballot_sync(kFullWarp, before.*kKey + up_to.*kKey <= number));
    if (found < kWarpSize) {
      if (found > 0) before += from_lane(up_to, found - 1);
      return {first + found, __shfl_sync(kFullWarp, blocks, found), before};
    }
    before += from_lane(up_to, kWarpSize - 1);
  }
  return {-1, 0, before};
}

__device__ __forceinline__ Counts all_of(const Arguments& x) {
  return find<&Counts::pairs>(x, INT_MAX).before;
}

// Of tiles on and above the diagonals of the images before one; by whole warps.
__device__ __forceinline__ int pairs_before(const Arguments& x, int image) {
  int own = 0;
  for (int i = threadIdx.x % kWarpSize; i < image; i += kWarpSize)
    own += counts_of(x.blocks(i)).pairs;
  return warp_total(own);
}

// An image's sums, as gram_kernel and cut_kernel leave them.
__device__ __forceinline__ Sums sums_of(const Arguments& x, int image) {
  const int first = pairs_before(x, image), left = x.most_pairs - first;
  const int pairs = min(counts_of(x.blocks(image)).pairs, max(left, 0));
  return {x.sums + int64_t{first} * kStrips * 3, pairs * kStrips};
}

// Tile (i, j), i <= j, of an image's Grams.
struct Tile {
  Found image;
  int i, j;

  __device__ __forceinline__ int side(int index) const {
    return min(kSide, image.blocks - index * kSide);
  }
  __device__ __forceinline__ int rows() const { return side(i); }
  __device__ __forceinline__ int columns() const { return side(j); }
  __device__ __forceinline__ bool on_diagonal() const { return i == j; }
  __device__ __forceinline__ int number() const {
    return image.before.pairs + i * tiles_of(image.blocks) - i * (i - 1) / 2 + j - i;
  }
  __device__ __forceinline__ int panel(int row, int block) const {
    return image.before.panels + row * image.blocks + block;
  }
};

// Two tiles that share a row or a column of tiles; the second may be missing.
struct Couple {
  Found image;  // .image is -1 for a number beyond the last
  int i[2], j[2];
  bool share_rows;  // else columns
  bool two;

  __device__ __forceinline__ Tile tile(int rank) const {
    return {image, rank == 0 ? i[0] : i[1], rank == 0 ? j[0] : j[1]};
  }
  __device__ __forceinline__ bool has(int rank) const { return rank == 0 || two; }
};

// The couple of a number; by whole warps.
__device__ __forceinline__ Couple couple_at(const Arguments& x, int number) {
  const Found image = find<&Counts::couples>(x, number);
  Couple couple = {image, {}, {}, true, true};
  if (image.image < 0) return couple;
  const int tiles = tiles_of(image.blocks);
  int rest = number - image.before.couples;
  if (rest >= row_couples(tiles)) {
    const int first = 2 * (rest - row_couples(tiles));
    couple.share_rows = false;
    couple.two = first + 1 < left_over(tiles);
    couple.j[0] = couple.j[1] = tiles - 1;
    couple.i[0] = tiles - 1 - 2 * first;
    couple.i[1] = couple.two ? couple.i[0] - 2 : couple.i[0];
    return couple;
  }
  int i = 0;
  for (; rest >= (tiles - i) / 2; ++i) rest -= (tiles - i) / 2;
  couple.i[0] = couple.i[1] = i;
  couple.j[0] = i + 2 * rest;
  couple.j[1] = couple.j[0] + 1;
  return couple;
}

// How the couples of a call are shared by its clusters.
struct Schedule {
  int whole;  // couples that are made whole, before the others
  int cut;    // the others
  int parts;  // of each of the others
  int student_stages;
  int stages;

  // Stages of a part.
  __device__ __forceinline__ int begin(int part) const { return stages * part / parts; }
  // The parts that have stages of a model: [first_part, last_part].
  __device__ __forceinline__ int part_of(int stage) const {
    return ((stage + 1) * parts + stages - 1) / stages - 1;
  }
  __device__ __forceinline__ int first_part(int model) const {
    return model == 0 ? 0 : part_of(student_stages);
  }
  __device__ __forceinline__ int last_part(int model) const {
    return model == 0 ? part_of(student_stages - 1) : parts - 1;
  }
  // Where a part leaves its sums of a model: the parts of the student lie before the teacher's, and
  // one part may have stages of both.
  __device__ __forceinline__ int slot(int couple, int rank, int part, int model) const {
    return (couple * 2 + rank) * (parts + 1) + part + model;
  }
};

// By whole warps.
__device__ __forceinline__ Schedule schedule_of(const Arguments& x) {
  const int couples = all_of(x).couples, student = x.stages(0), stages = student + x.stages(1);
  const int rest = couples % x.clusters;
  const int parts = rest > 0 ? min(x.clusters / rest, max(1, stages / kLeastPart)) : 1;
  const int cut = parts > 1 ? rest : 0;
  return {couples - cut, cut, parts, student, stages};
}

// Slots of cut couples: at most half of the clusters' number, of two or more parts each. Behind
// them, one for each thread block.
GRACE_HOST_DEVICE int cut_slots(int clusters) { return 2 * clusters + 2 * (clusters / 2); }

// Whether the tile has to be made.
template <bool kBackward>
__device__ __forceinline__ bool wanted(const Tile& tile, const Arguments& x) {
  if (tile.number() >= x.most_pairs) return false;  // images must not overlap, but may
  if constexpr (!kBackward) return true;
  if (x.saved[tile.image.image * kSavedColumns + kCounted] == 0.0f) return false;
  return x.panels.has(tile.panel(tile.i, 0)) || x.panels.has(tile.panel(tile.j, 0));
}

}  // namespace grace::cka::warpgroup
