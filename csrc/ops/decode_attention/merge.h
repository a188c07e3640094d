// Partial softmax sums become one: of the warps of a block, then of the blocks of a cluster.
//
// A part is, of every query head, the largest score (in units of log 2), the sum of its weights and
// dim sums of values, all relative to that score. Parts are added in the order of warps and of
// blocks.
#pragma once

#include "common/cluster.h"
#include "ops/decode_attention/tile.h"

namespace grace::decode_attention {

struct Part {
  float *most, *sum, *out;  // [kMostHeads], [kMostHeads], [group][dim]
};

// Floats of one part, and where part i lies.
GRACE_HOST_DEVICE constexpr int part_floats(int group, int dim) {
  return 2 * kMostHeads + group * dim;
}
__device__ __forceinline__ Part part_at(float* parts, int i, int group, int dim) {
  float* const at = parts + i * part_floats(group, dim);
  return {at, at + kMostHeads, at + 2 * kMostHeads};
}

template <int kDim, int kHalves, typename T>
__device__ __forceinline__ void store_part(const Sums<kDim, kHalves, T>& sums, int group,
                                           const Part& part) {
  const int lane = threadIdx.x % kWarpSize, gid = lane / 4, tig = lane % 4;
#pragma unroll
  for (int r = 0; r < kHalves; ++r) {
    float sum = sums.sum[r];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    if (tig == 0 && 8 * r + gid < group) {
      part.most[8 * r + gid] = sums.most[r];
      part.sum[8 * r + gid] = sum;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 8 * r + 2 * tig + i;
      if (head >= group) continue;
#pragma unroll
      for (int u = 0; u < kDim / 16; u += 2)
        *reinterpret_cast<float4*>(part.out + head * kDim + u / 4 * 64 + 8 * gid + u % 4 * 2) = {
            sums.out[u][r][i], sums.out[u][r][2 + i], sums.out[u + 1][r][i],
            sums.out[u + 1][r][2 + i]};
    }
  }
}

// Of parts that `most(i)`, `sum(i)` and `out(i)` give for one head and element.
struct Total {
  float most, sum, out;
};
template <typename Most, typename Sum, typename Out>
__device__ __forceinline__ Total add_parts(int parts, Most&& most, Sum&& sum, Out&& out) {
  Total total = {kNone, 0.0f, 0.0f};
  for (int i = 0; i < parts; ++i) total.most = fmaxf(total.most, most(i));
  const float base = total.most == kNone ? 0.0f : total.most;
  for (int i = 0; i < parts; ++i) {
    const float weight = exp2f(most(i) - base);
    total.sum += weight * sum(i);
    total.out += weight * out(i);
  }
  return total;
}

// Adds up the parts first ... first + count - 1 of elements begin ... end - 1, and calls
// write(head, element, total).
template <int kDim, typename Write>
__device__ __forceinline__ void merge(float* parts, int first, int count, int group, int begin,
                                      int end, Write&& write) {
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const int head = i / kDim;
    const auto part = [&](int at) { return part_at(parts, first + at, group, kDim); };
    write(head, i,
          add_parts(
              count, [&](int at) { return part(at).most[head]; },
              [&](int at) { return part(at).sum[head]; }, [&](int at) { return part(at).out[i]; }));
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Adds up the block's parts and sends the result to the blocks of the cluster, each of which
// finishes its share of the elements: there it lies behind the parts of that block's warps.
template <int kDim>
__device__ __forceinline__ void send(float* parts, int group, int rank, int cluster) {
  const int all = group * kDim;
  const Part to = part_at(parts, kWarps + rank, group, kDim);
  merge<kDim>(parts, 0, kWarps, group, 0, all, [&](int head, int i, const Total& total) {
    write_remote(address_in(to.out + i, i * cluster / all), total.out);
    if (i % kDim != 0) return;
    for (int block = 0; block < cluster; ++block) {
      write_remote(address_in(to.most + head, block), total.most);
      write_remote(address_in(to.sum + head, block), total.sum);
    }
  });
}

#endif

}  // namespace grace::decode_attention
