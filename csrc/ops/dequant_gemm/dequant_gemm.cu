// dequant_gemm on CUDA, sm_80 and later: a block computes 64 rows of the weight times 8 to 64 rows
// of x. The weight is operand A of the tensor cores ("swap-AB"): what a lane loads is its fragment.
#include "common/launch.h"
#include "common/mma.h"
#include "ops/dequant_gemm/call.h"
#include "ops/dequant_gemm/dequant_gemm.h"
#include "ops/dequant_gemm/plans.h"
#include "ops/dequant_gemm/tensor_core.h"

namespace grace::dequant_gemm {
namespace {

constexpr int kWarps = kTile / kBand;  // a warp a band
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kChunk = 8;  // elements of 16 bits in a 16-byte access

// A row of x's tile in shared memory: 64 columns, and 16 bytes that shift the next row's banks so
// that the eight rows of a fragment are read without conflicts.
constexpr int kSharedStride = kTile + kChunk;
constexpr int kFloatStride = kTile + 4;

// Sums of a warp: 16 rows of the weight times kTiles tiles of 8 rows of x.
template <int kTiles>
struct Sums {
  float group[kTiles][4] = {};  // over the current group, of codes times x
  float total[kTiles][4] = {};  // scaled

  // Scales in fp32, where the group ends: inside it, codes are exact integers.
  __device__ __forceinline__ void end_group(float scale_low, float scale_high) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[j][i] += (i < 2 ? scale_low : scale_high) * group[j][i];
        group[j][i] = 0.0f;
      }
    }
  }
};

// Copies x[rows from m][64 columns from k] to shared memory, zeros beyond x.
template <int kRows, typename T>
__device__ __forceinline__ void load_x(const Call<T>& call, int64_t m, int64_t k, bool aligned,
                                       T* shared) {
  const Problem& p = call.problem;
  for (int i = threadIdx.x; i < kRows * kTile / kChunk; i += kThreads) {
    const int row = i / (kTile / kChunk), column = i % (kTile / kChunk) * kChunk;
    const T* from = call.x + (m + row) * p.k + k + column;
    T* to = shared + row * kSharedStride + column;
    const int64_t left = m + row < p.m ? p.k - (k + column) : 0;
    if (aligned && left >= kChunk) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < kChunk; ++j) to[j] = j < left ? from[j] : T{0};
    }
  }
}

// A lane's words of one band of a tile: the four blocks of 16 columns, in order.
template <int kBits>
__device__ __forceinline__ void load_words(const uint32_t* band, int lane,
                                           uint32_t (&words)[kBits]) {
#pragma unroll
  for (int i = 0; i < kBits / 4; ++i) {
    const uint4 four = reinterpret_cast<const uint4*>(band)[i * kWarpSize + lane];
    words[4 * i] = four.x;
    words[4 * i + 1] = four.y;
    words[4 * i + 2] = four.z;
    words[4 * i + 3] = four.w;
  }
}

// One block of 16 columns: the weights' fragment against every tile of 8 rows of x.
template <int kBits, int kTiles, typename T>
__device__ __forceinline__ void multiply_block(const uint32_t* words, const T* shared, int block,
                                               int lane, Sums<kTiles>& sums) {
  uint32_t a[4];
  decode_block<kBits, T>(words + block * Layout<kBits>::kBlockWords, a);
  const int gid = lane / 4, tig = lane % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const T* from = shared + (j * 8 + gid) * kSharedStride + block * kBlock + 2 * tig;
    const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(from),
                           *reinterpret_cast<const uint32_t*>(from + 8)};
    mma_m16n8k16<T>(sums.group[j], a, b);
  }
}

// Epilogue, and the turn from [n][m] to rows of the output, by way of shared memory.
template <int kTiles, typename T>
__device__ __forceinline__ void store(const Call<T>& call, const Sums<kTiles>& sums, int64_t n,
                                      int64_t m, float* shared) {
  const Problem& p = call.problem;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int row = warp * kBand + lane / 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* to = shared + (j * 8 + lane % 4 * 2 + i) * kFloatStride;
      const float low = call.biased(sums.total[j][i], n + row);
      const float high = call.biased(sums.total[j][i + 2], n + row + 8);
      if (call.swiglu) {
        to[swiglu_column(row)] = swiglu(low, high);
      } else {
        to[row] = low;
        to[row + 8] = high;
      }
    }
  }
  __syncthreads();
  const int width = call.swiglu ? kTile / 2 : kTile;
  const int64_t first = call.swiglu ? n / 2 : n;
  for (int i = threadIdx.x; i < kTiles * 8 * width; i += kThreads) {
    const int x_row = i / width, column = i % width;
    if (m + x_row < p.m && first + column < call.columns())
      call.out[(m + x_row) * call.columns() + first + column] =
          call.finished(shared[x_row * kFloatStride + column], m + x_row, first + column);
  }
}

template <int kBits, int kTiles, typename T>
__global__ void __launch_bounds__(kThreads) dequant_gemm_kernel(Call<T> call, bool aligned) {
  const Problem& p = call.problem;
  alignas(16) __shared__ float buffer[kTiles * 8 * kFloatStride];
  T* const shared = reinterpret_cast<T*>(buffer);  // x first, sums at the end
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t n = int64_t{blockIdx.x} * kTile, m = int64_t{blockIdx.y} * kTiles * 8;
  const int64_t row = n + warp * kBand + lane / 4;  // and row + 8: inside the padded scales
  const uint32_t* band = call.qweight + blockIdx.x * p.k_tiles * Layout<kBits>::kTileWords +
                         warp * Layout<kBits>::kBandWords;
  const int64_t blocks = ceil_div<int64_t>(p.k, kBlock);
  const int64_t group_blocks = p.group_size / kBlock;

  Sums<kTiles> sums;
  int64_t group = 0, left = group_blocks;  // blocks until the group ends
  for (int64_t tile = 0; tile < p.k_tiles; ++tile) {
    uint32_t words[kBits];
    load_words<kBits>(band + tile * Layout<kBits>::kTileWords, lane, words);
    load_x<kTiles * 8>(call, m, tile * kTile, aligned, shared);
    __syncthreads();
#pragma unroll
    for (int block = 0; block < kBlocksPerTile; ++block) {
      const int64_t after = tile * kBlocksPerTile + block + 1;
      if (after > blocks) break;
      multiply_block<kBits>(words, shared, block, lane, sums);
      if (--left == 0 || after == blocks) {
        sums.end_group(call.scales.at(group, row), call.scales.at(group, row + 8));
        left = group_blocks;
        ++group;
      }
    }
    __syncthreads();
  }
  store(call, sums, n, m, buffer);
}

// Any group size: a thread an output, codes one at a time.
constexpr int kAnyThreads = 256;

template <int kBits, typename T>
__device__ float any_group_sum(const Call<T>& call, int64_t m, int64_t n) {
  const Problem& p = call.problem;
  float total = 0.0f;
  for (int64_t group = 0; group < p.groups(); ++group) {
    float sum = 0.0f;
    const int64_t begin = group * p.group_size;
    // One group a row is as long as its tiles: x ends earlier.
    const int64_t end = begin + p.group_size < p.k ? begin + p.group_size : p.k;
    for (int64_t k = begin; k < end; ++k) {
      sum += static_cast<float>(code_at<kBits>(call.qweight, p.k_tiles, n, k)) *
             to_float(call.x[m * p.k + k]);
    }
    total += call.scales.at(group, n) * sum;
  }
  return call.biased(total, n);
}

template <int kBits, typename T>
__global__ void __launch_bounds__(kAnyThreads) dequant_gemm_any_group_kernel(Call<T> call) {
  const int64_t i = int64_t{blockIdx.x} * kAnyThreads + threadIdx.x, columns = call.columns();
  if (i >= call.problem.m * columns) return;
  const int64_t m = i / columns, column = i % columns;
  if (call.swiglu) {
    const int64_t gate = column / (kBand / 2) * kBand + column % (kBand / 2);
    const float value = swiglu(any_group_sum<kBits>(call, m, gate),
                               any_group_sum<kBits>(call, m, gate + kBand / 2));
    call.out[i] = call.finished(value, m, column);
  } else {
    call.out[i] = call.finished(any_group_sum<kBits>(call, m, column), m, column);
  }
}

// --- choice and launch --------------------------------------------------------------------------

template <int kBits, int kTiles, typename T>
void launch_tiles(const Call<T>& call, int device) {
  const Problem& p = call.problem;
  const bool aligned = p.k % kChunk == 0 && reinterpret_cast<uintptr_t>(call.x) % 16 == 0;
  const dim3 grid(p.n_tiles, static_cast<unsigned>(ceil_div<int64_t>(p.m, kTiles * 8)));
  launch(dequant_gemm_kernel<kBits, kTiles, T>, {grid, kThreads}, device, call, aligned);
}

template <int kBits, typename T>
void launch_any_group(const Call<T>& call, int device) {
  const dim3 grid(ceil_div<int64_t>(call.problem.m * call.columns(), kAnyThreads));
  launch(dequant_gemm_any_group_kernel<kBits, T>, {grid, kAnyThreads}, device, call);
}

template <int kBits, typename T>
void launch_portable(const Call<T>& call, int device) {
  const int64_t m = call.problem.m;
  if (m <= 8) return launch_tiles<kBits, 1>(call, device);
  if (m <= 16) return launch_tiles<kBits, 2>(call, device);
  if (m <= 32) return launch_tiles<kBits, 4>(call, device);
  launch_tiles<kBits, 8>(call, device);
}

template <int kBits, typename T>
bool runs(const Call<T>& call, const Plan& plan, int device) {
  switch (plan.family) {
    case Family::kAnyGroup:
      return plan.variant == 0;
    case Family::kPortable:
      return plan.variant == 0 && call.problem.whole_blocks();
    case Family::kDecode:
      return plan.variant < decode_variants() && decode_runs<kBits>(call, plan.variant, device);
    case Family::kWarpgroup:
      return plan.variant < warpgroup_variants() &&
             warpgroup_runs<kBits>(call, plan.variant, device);
  }
  return false;
}

// What was measured for the most similar layer, if it runs here; else the first that does of a list
// from the quickest kernel to the one that runs everything.
template <int kBits, typename T>
Plan choose(const Call<T>& call, int device) {
  const Problem& p = call.problem;
  const int64_t measured = measured_plan(Device::of(device).name, kBits, p.m, p.n, p.k);
  if (measured >= 0 && runs<kBits>(call, plan_of(measured), device)) return plan_of(measured);
  for (int variant = 0; variant < decode_variants(); ++variant)
    if (decode_runs<kBits>(call, variant, device)) return {Family::kDecode, variant};
  for (int variant = 0; variant < warpgroup_variants(); ++variant)
    if (warpgroup_runs<kBits>(call, variant, device)) return {Family::kWarpgroup, variant};
  return {p.whole_blocks() ? Family::kPortable : Family::kAnyGroup, 0};
}

template <int kBits, typename T>
void run_plan(const Call<T>& call, const Plan& plan, int device) {
  switch (plan.family) {
    case Family::kAnyGroup:
      return launch_any_group<kBits>(call, device);
    case Family::kPortable:
      return launch_portable<kBits>(call, device);
    case Family::kDecode:
      return decode<kBits>(call, plan.variant, device);
    case Family::kWarpgroup:
      return warpgroup<kBits>(call, plan.variant, device);
  }
}

struct Run {
  int device;
  int64_t plan;

  template <int kBits, typename T>
  void operator()(const Call<T>& call) const {
    if constexpr (std::is_same_v<T, float>) {
      STD_TORCH_CHECK(false, "dequant_gemm: x must be float16 or bfloat16 on a GPU");
    } else {
      const Plan chosen = plan == -1 ? choose<kBits>(call, device) : plan_of(plan);
      STD_TORCH_CHECK(plan == -1 || runs<kBits>(call, chosen, device), "dequant_gemm: plan ", plan,
                      " does not run this call");
      run_plan<kBits>(call, chosen, device);
    }
  }
};

Tensor dequant_gemm_cuda(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                         const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                         int64_t out_features, const std::optional<Tensor>& residual, bool swiglu,
                         int64_t plan, bool settled) {
  return run_on(
      {x, qweight, scales, bias, bits, group_size, out_features, residual, swiglu, settled},
      Run{device_of(x), plan});
}

struct Asks {
  int device;
  int64_t plan;
  bool& answer;

  template <int kBits, typename T>
  void operator()(const Call<T>& call) const {
    if constexpr (!std::is_same_v<T, float>)
      answer = plan >= 0 && runs<kBits>(call, plan_of(plan), device);
  }
};

bool dequant_gemm_runs_cuda(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                            int64_t bits, int64_t group_size, int64_t out_features, int64_t plan) {
  bool answer = false;
  const std::optional<Tensor> none;
  run_on({x, qweight, scales, none, bits, group_size, out_features, none, false, true},
         Asks{device_of(x), plan, answer});
  return answer;
}

}  // namespace
}  // namespace grace::dequant_gemm

GRACE_CUDA_KERNELS(m) {
  m.impl("dequant_gemm", TORCH_BOX(&grace::dequant_gemm::dequant_gemm_cuda));
  m.impl("dequant_gemm_runs", TORCH_BOX(&grace::dequant_gemm::dequant_gemm_runs_cuda));
}
