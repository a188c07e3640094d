// rotary on CUDA: queries and keys in one launch, each head read once, written once.
//
//   block: a token and some of its heads     team: some lanes of a warp, for 2 heads
//   lane:  the vectors of 16 bytes at i and at dim/2 + i, so that only the sum of squares of a norm
//          is exchanged; cosines and sines there, for both of its heads
//
// A team has 4, 8, 16 or 32 lanes (dim 128 in 16 bits: 8). Where halves are not whole vectors on
// the 16-byte grid, or too wide, a warp takes a head by elements and reads it again behind its
// norm.
//
// The launch is a dependent one. Before the wait the weights of norms are only brought near.
#include "common/vectors.h"
#include "common/warp.h"
#include "ops/rms_norm/rms_norm.h"

namespace grace::rotary {
namespace {

using rms_norm::Norm;

constexpr int kThreads = 128;  // of a block
constexpr int kHeads = 2;      // of a team

// Queries or keys.
template <typename T>
struct Heads {
  const T* x;       // [rows, tokens, count, dim], the heads of a token one behind the other
  const T* weight;  // [dim], or null
  T* y;             // [rows, count, tokens, dim], contiguous
  int64_t row_stride, token_stride;
  int count;

  bool in_vectors() const {
    return is_vector_aligned(x) && is_vector_aligned(weight) && row_stride % kPerVector<T> == 0 &&
           token_stride % kPerVector<T> == 0;
  }
};

template <typename T>
struct Call {
  Heads<T> q, k;
  const T *cos, *sin;        // [rows or 1, tokens, dim]
  int64_t embedding_stride;  // of rows; 0 where one is for all
  int64_t rows, tokens;
  int dim;
  Norm norm;

  bool in_vectors() const {
    return dim % (2 * kPerVector<T>) == 0 && dim <= 2 * kWarpSize * kPerVector<T> &&
           q.in_vectors() && k.in_vectors() && is_vector_aligned(cos) && is_vector_aligned(sin);
  }
  GRACE_HOST_DEVICE int heads() const { return q.count + k.count; }
  GRACE_HOST_DEVICE bool has_norm() const { return q.weight != nullptr || k.weight != nullptr; }
};

// One head of the block's token, queries before keys; all null behind the last.
template <typename T>
struct Head {
  const T *x = nullptr, *weight = nullptr;
  T* y = nullptr;

  __device__ __forceinline__ Head(const Call<T>& call, int index) {
    if (index >= call.heads()) return;
    const bool is_query = index < call.q.count;
    const Heads<T>& from = is_query ? call.q : call.k;
    const int64_t head = is_query ? index : index - call.q.count;
    const int64_t row = blockIdx.z, token = blockIdx.x;
    x = from.x + row * from.row_stride + token * from.token_stride + head * call.dim;
    y = from.y + ((row * from.count + head) * call.tokens + token) * call.dim;
    weight = from.weight;
  }
};

// Where the block's token has its cosines and sines.
template <typename T>
__device__ __forceinline__ int64_t embedding(const Call<T>& call) {
  return blockIdx.z * call.embedding_stride + int64_t{blockIdx.x} * call.dim;
}

template <typename T>
__device__ __forceinline__ void prefetch_weights(const Call<T>& call) {
  if (blockIdx.x + blockIdx.y + blockIdx.z != 0) return;  // one block's are for all
  constexpr int kStep = 32 / sizeof(T);                   // a sector
  for (int i = threadIdx.x * kStep; i < call.dim; i += kThreads * kStep) {
    if (call.q.weight != nullptr) prefetch_to_l2(call.q.weight + i);
    if (call.k.weight != nullptr) prefetch_to_l2(call.k.weight + i);
  }
}

// --- by vectors ----------------------------------------------------------------------------------

template <typename T>
struct Halves {
  uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};

  __device__ __forceinline__ void load(const T* from, int half) {
    low = load_written_vector(from);
    high = load_written_vector(from + half);
  }
};

template <typename T>
struct Values {
  float low[kPerVector<T>], high[kPerVector<T>];

  __device__ __forceinline__ explicit Values(const Halves<T>& of) {
    unpack_vector<T>(of.low, low);
    unpack_vector<T>(of.high, high);
  }
};

template <typename T>
__device__ __forceinline__ float sum_of_squares(const Halves<T>& of) {
  const Values<T> x(of);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) sum += x.low[i] * x.low[i] + x.high[i] * x.high[i];
  return sum;
}

template <typename T>
__device__ __forceinline__ void apply_norm(Values<T>& x, const Halves<T>& weights, float factor) {
  const Values<T> weight(weights);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    x.low[i] = x.low[i] * factor * weight.low[i];
    x.high[i] = x.high[i] * factor * weight.high[i];
  }
}

template <typename T>
__device__ __forceinline__ void store_embedded(T* to, int half, const Values<T>& x,
                                               const Halves<T>& cosines, const Halves<T>& sines) {
  const Values<T> cos(cosines), sin(sines);
  float low[kPerVector<T>], high[kPerVector<T>];
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    low[i] = x.low[i] * cos.low[i] - x.high[i] * sin.low[i];
    high[i] = x.high[i] * cos.high[i] + x.low[i] * sin.high[i];
  }
  store_vector(to, pack_vector<T>(low));
  store_vector(to + half, pack_vector<T>(high));
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) rotary_kernel(Call<T> call) {
  constexpr int kTeams = kThreads / kLanes;
  const int team = threadIdx.x / kLanes, at = threadIdx.x % kLanes * kPerVector<T>;
  const int half = call.dim / 2, first = static_cast<int>(blockIdx.y) * kHeads * kTeams + team;
  prefetch_weights(call);
  wait_for_previous_kernel();
  Halves<T> x[kHeads], weights[kHeads], cos, sin;
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    const Head<T> head(call, first + j * kTeams);
    if (at >= half || head.x == nullptr) continue;
    x[j].load(head.x + at, half);
    if (head.weight != nullptr) weights[j].load(head.weight + at, half);
  }
  if (at < half) {
    cos.load(call.cos + embedding(call) + at, half);
    sin.load(call.sin + embedding(call) + at, half);
  }
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    const Head<T> head(call, first + j * kTeams);
    const float sum = call.has_norm() ? warp_sum<kLanes>(sum_of_squares(x[j])) : 0.0f;
    Values<T> values(x[j]);
    if (head.weight != nullptr) apply_norm(values, weights[j], call.norm.factor(sum));
    if (at < half && head.y != nullptr) store_embedded(head.y + at, half, values, cos, sin);
  }
}

// --- by elements ---------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ float sum_of_squares(const T* x, int first, int end) {
  float sum = 0.0f;
  for (int i = first; i < end; i += kWarpSize) sum += to_float(x[i]) * to_float(x[i]);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rotary_elements_kernel(Call<T> call) {
  constexpr int kTeams = kThreads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, half = call.dim / 2;
  const Head<T> head(call, static_cast<int>(blockIdx.y * kTeams + threadIdx.x / kWarpSize));
  wait_for_previous_kernel();
  if (head.x == nullptr) return;  // the whole warp
  const T *const cos = call.cos + embedding(call), *const sin = call.sin + embedding(call);
  const bool has_norm = head.weight != nullptr;
  const float sum = has_norm ? warp_sum(sum_of_squares(head.x, lane, call.dim)) : 0.0f;
  const float factor = call.norm.factor(sum);
  const auto value = [&](int i) {
    const float x = to_float(head.x[i]);
    return has_norm ? x * factor * to_float(head.weight[i]) : x;
  };
  for (int i = lane, j = lane + half; i < half; i += kWarpSize, j += kWarpSize) {
    const float low = value(i), high = value(j);
    head.y[i] = from_float<T>(low * to_float(cos[i]) - high * to_float(sin[i]));
    head.y[j] = from_float<T>(high * to_float(cos[j]) + low * to_float(sin[j]));
  }
}

// --- launch --------------------------------------------------------------------------------------

template <typename T>
void launch_heads(void (*kernel)(Call<T>), const Call<T>& call, int heads_of_block, int device) {
  const int parts = ceil_div(call.heads(), heads_of_block);
  STD_TORCH_CHECK(parts < 65536 && call.rows < 65536 && call.tokens < int64_t{1} << 31,
                  "rotary: q and k must have less than 65536 rows and 262144 heads, got ",
                  call.rows, " and ", call.heads());
  LaunchShape shape = {dim3(static_cast<unsigned>(call.tokens), static_cast<unsigned>(parts),
                            static_cast<unsigned>(call.rows)),
                       kThreads};
  shape.dependent = true;
  launch(kernel, shape, device, call);
}

template <int kLanes, typename T>
void launch_teams(const Call<T>& call, int device) {
  launch_heads(rotary_kernel<T, kLanes>, call, kThreads / kLanes * kHeads, device);
}

template <typename T>
void launch_call(const Call<T>& call, int device) {
  if (!call.in_vectors())
    return launch_heads(rotary_elements_kernel<T>, call, kThreads / kWarpSize, device);
  const int vectors = call.dim / 2 / kPerVector<T>;
  if (vectors <= 4) return launch_teams<4>(call, device);
  if (vectors <= 8) return launch_teams<8>(call, device);
  if (vectors <= 16) return launch_teams<16>(call, device);
  launch_teams<32>(call, device);
}

template <typename T>
Heads<T> heads_of(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& y) {
  const T* const weights = weight.has_value() ? data<const T>(*weight) : nullptr;
  return {data<const T>(x), weights,     data<T>(y),
          x.stride(0),      x.stride(1), static_cast<int>(x.size(2))};
}

Tensor turned_like(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)});
}

// q and k [rows, tokens, heads, dim], the heads of a token contiguous; cos and sin [rows or 1,
// tokens, dim] and weights [dim] contiguous; all of one dtype: checked in Python.
std::tuple<Tensor, Tensor> rotary_cuda(const Tensor& q, const Tensor& k, const Tensor& cos,
                                       const Tensor& sin, std::optional<Tensor> q_weight,
                                       std::optional<Tensor> k_weight, double eps) {
  Tensor turned_q = turned_like(q), turned_k = turned_like(k);
  const int64_t rows = q.size(0), tokens = q.size(1), dim = q.size(3);
  if (turned_q.numel() + turned_k.numel() == 0) return {turned_q, turned_k};
  dispatch_floating(q.scalar_type(), "rotary", [&](auto element) {
    using T = decltype(element);
    const Call<T> call = {heads_of<T>(q, q_weight, turned_q),
                          heads_of<T>(k, k_weight, turned_k),
                          data<const T>(cos),
                          data<const T>(sin),
                          cos.size(0) == 1 ? 0 : tokens * dim,
                          rows,
                          tokens,
                          static_cast<int>(dim),
                          Norm(dim, eps)};
    launch_call(call, device_of(q));
  });
  return {turned_q, turned_k};
}

}  // namespace
}  // namespace grace::rotary

GRACE_CUDA_KERNELS(m) { m.impl("rotary", TORCH_BOX(&grace::rotary::rotary_cuda)); }
