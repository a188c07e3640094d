// rms_norm on CUDA: a row is held in the registers of a team of threads, read once, written once.
//
//   columns in vectors of 16 bytes      team                     vectors a thread
//   to    16 (heads of 128)             8 lanes, 32 rows a block      2
//   to    32                           16 lanes                       2
//   to    64                           32 lanes                       2
//   to   128                           32 lanes                       4
//   to  2048 (8192 fp32, 16384 16-bit) a block of 256                 1, 2, 4, 8
//   beyond                             a block, which reads x twice
//
// The team is chosen by the columns alone, so that a row's result does not depend on how many rows
// there are. Rows off the 16-byte grid are read twice, an element at a time.
//
// All launches are dependent ones. The weight may be what the kernel ahead writes, so before the
// wait it is not read but brought near: a decode step finds it in no cache.
#include "common/vectors.h"
#include "common/warp.h"
#include "ops/rms_norm/rms_norm.h"

namespace grace::rms_norm {
namespace {

constexpr int kThreads = 256;  // of a block

template <typename T>
struct Call {
  const T* x;       // [rows, columns]
  const T* weight;  // [columns]
  T* y;             // [rows, columns]
  int64_t rows, columns;
  Norm norm;

  bool in_vectors() const {
    return columns % kPerVector<T> == 0 && is_vector_aligned(x) && is_vector_aligned(weight);
  }
};

// The threads of a row: kTeam lanes of a warp, or the block.
template <int kTeam>
struct Team {
  static constexpr int kRows = kThreads / kTeam;  // of a block

  int64_t row;
  int rank;

  __device__ __forceinline__ Team()
      : row(int64_t{blockIdx.x} * kRows + threadIdx.x / kTeam), rank(threadIdx.x % kTeam) {}

  // All threads of the block must call.
  static __device__ __forceinline__ float sum(float x) {
    if constexpr (kTeam <= kWarpSize) {
      return warp_sum<kTeam>(x);
    } else {
      static_assert(kTeam == kThreads);
      __shared__ float scratch[kThreads / kWarpSize];
      return block_sum<kThreads>(x, scratch);
    }
  }
};

template <typename T>
__device__ __forceinline__ void prefetch_weight(const Call<T>& call) {
  if (blockIdx.x != 0) return;           // one block's is for all
  constexpr int kStep = 32 / sizeof(T);  // a sector
  for (int64_t c = int64_t{threadIdx.x} * kStep; c < call.columns; c += kThreads * kStep)
    prefetch_to_l2(call.weight + c);
}

// --- in registers --------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ float sum_of_squares(uint4 vector) {
  float x[kPerVector<T>];
  unpack_vector<T>(vector, x);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) sum += x[i] * x[i];
  return sum;
}

template <typename T>
__device__ __forceinline__ uint4 scaled(uint4 vector, uint4 weights, float factor) {
  float x[kPerVector<T>], weight[kPerVector<T>];
  unpack_vector<T>(vector, x);
  unpack_vector<T>(weights, weight);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) x[i] = x[i] * factor * weight[i];
  return pack_vector<T>(x);
}

template <typename T, int kTeam, int kVectors>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(Call<T> call) {
  const Team<kTeam> team;
  const T* const x = call.x + team.row * call.columns;
  T* const y = call.y + team.row * call.columns;
  const auto column = [&](int j) { return (j * kTeam + team.rank) * kPerVector<T>; };
  const auto inside = [&](int j) { return team.row < call.rows && column(j) < call.columns; };
  prefetch_weight(call);
  wait_for_previous_kernel();
  uint4 vectors[kVectors], weights[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j)
    vectors[j] = inside(j) ? load_written_vector(x + column(j)) : uint4{0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < kVectors; ++j)
    weights[j] = inside(j) ? load_written_vector(call.weight + column(j)) : uint4{0, 0, 0, 0};
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) sum += sum_of_squares<T>(vectors[j]);
  const float factor = call.norm.factor(team.sum(sum));
#pragma unroll
  for (int j = 0; j < kVectors; ++j)
    if (inside(j)) store_vector(y + column(j), scaled<T>(vectors[j], weights[j], factor));
}

// --- any columns, any alignment ------------------------------------------------------------------

template <typename T, int kTeam, bool kInVectors>
__global__ void __launch_bounds__(kThreads) read_twice_kernel(Call<T> call) {
  constexpr int kPer = kInVectors ? kPerVector<T> : 1;
  const Team<kTeam> team;
  const T* const x = call.x + team.row * call.columns;
  T* const y = call.y + team.row * call.columns;
  const int64_t end = team.row < call.rows ? call.columns : 0;
  prefetch_weight(call);
  wait_for_previous_kernel();
  float sum = 0.0f;
  for (int64_t c = team.rank * kPer; c < end; c += kTeam * kPer) {
    if constexpr (kInVectors) {
      sum += sum_of_squares<T>(load_written_vector(x + c));
    } else {
      sum += to_float(x[c]) * to_float(x[c]);
    }
  }
  const float factor = call.norm.factor(team.sum(sum));
  for (int64_t c = team.rank * kPer; c < end; c += kTeam * kPer) {
    if constexpr (kInVectors) {
      const uint4 weights = load_written_vector(call.weight + c);
      store_vector(y + c, scaled<T>(load_written_vector(x + c), weights, factor));
    } else {
      y[c] = from_float<T>(to_float(x[c]) * factor * to_float(call.weight[c]));
    }
  }
}

// --- launch --------------------------------------------------------------------------------------

template <int kTeam, typename T>
void launch_teams(void (*kernel)(Call<T>), const Call<T>& call, int device) {
  const int64_t blocks = ceil_div<int64_t>(call.rows, Team<kTeam>::kRows);
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "rms_norm: x must have less rows, got ", call.rows);
  LaunchShape shape = {dim3(static_cast<unsigned>(blocks)), kThreads};
  shape.dependent = true;
  launch(kernel, shape, device, call);
}

template <int kTeam, int kVectors, typename T>
void launch_held(const Call<T>& call, int device) {
  launch_teams<kTeam>(rms_norm_kernel<T, kTeam, kVectors>, call, device);
}

template <typename T>
void launch_vectors(const Call<T>& call, int device) {
  const int64_t vectors = call.columns / kPerVector<T>;
  if (vectors <= 16) return launch_held<8, 2>(call, device);
  if (vectors <= 32) return launch_held<16, 2>(call, device);
  if (vectors <= 64) return launch_held<32, 2>(call, device);
  if (vectors <= 128) return launch_held<32, 4>(call, device);
  if (vectors <= 1 * kThreads) return launch_held<kThreads, 1>(call, device);
  if (vectors <= 2 * kThreads) return launch_held<kThreads, 2>(call, device);
  if (vectors <= 4 * kThreads) return launch_held<kThreads, 4>(call, device);
  if (vectors <= 8 * kThreads) return launch_held<kThreads, 8>(call, device);
  launch_teams<kThreads>(read_twice_kernel<T, kThreads, true>, call, device);
}

template <typename T>
void launch_elements(const Call<T>& call, int device) {
  if (call.columns <= 1024)
    return launch_teams<kWarpSize>(read_twice_kernel<T, kWarpSize, false>, call, device);
  launch_teams<kThreads>(read_twice_kernel<T, kThreads, false>, call, device);
}

// x [..., D] and weight [D], contiguous and of one dtype: checked in Python.
Tensor rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps) {
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const int64_t columns = weight.size(0), rows = x.numel() / columns;
  dispatch_floating(x.scalar_type(), "rms_norm", [&](auto element) {
    using T = decltype(element);
    const Call<T> call = {data<const T>(x), data<const T>(weight), data<T>(y), rows,
                          columns,          Norm(columns, eps)};
    const auto run = call.in_vectors() ? launch_vectors<T> : launch_elements<T>;
    run(call, device_of(x));
  });
  return y;
}

}  // namespace
}  // namespace grace::rms_norm

GRACE_CUDA_KERNELS(m) { m.impl("rms_norm", TORCH_BOX(&grace::rms_norm::rms_norm_cuda)); }
