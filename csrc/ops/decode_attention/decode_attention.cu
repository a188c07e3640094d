// decode_attention on CUDA: a cluster of blocks for every row and head of the cache.
//
//   new token: norm, rotary ──► q in shared memory; k and v into the cache, by the block whose tile
//   holds its place           (the first tiles are on their way meanwhile)
//   a warp: every (8 · cluster)-th tile of 16 tokens, by mma.sync, keys and values from global
//   memory to registers; the next tile's keys are loaded when scores are made, its values when
//   they are added
//   sums of warps, then of blocks through each other's shared memory ──► output
//
// Tokens are dealt out tile by tile, so that work is even whatever the position, which only the
// device knows.
#include "ops/decode_attention/merge.h"

namespace grace::decode_attention {
namespace {

// Elements between queries in shared memory: eight rows then lie in different banks.
template <int kDim>
constexpr int kPitch = kDim + 8;

template <int kDim>
constexpr int query_bytes() {
  return kMostHeads * kPitch<kDim> * 2;
}

template <int kDim>
size_t shared_bytes(int group, int cluster) {
  const int parts = kWarps + (cluster > 1 ? cluster : 0);
  return query_bytes<kDim>() + parts * part_floats(group, kDim) * sizeof(float);
}

// Where a block stands.
struct Place {
  int row, kv_head, rank, cluster;

  __device__ Place(int kv_heads, int cluster_size)
      : rank(static_cast<int>(cluster_rank())), cluster(cluster_size) {
    const int pair = static_cast<int>(blockIdx.x) / cluster_size;
    row = pair / kv_heads;
    kv_head = pair % kv_heads;
  }
};

// Queries into shared memory, a warp a head; the key and the value into the cache, if it is this
// block's task.
template <int kDim, typename T>
__device__ __forceinline__ void take_token(const Call<T>& call, const Place& place, bool writes,
                                           const Cache<T>& cache, T* queries) {
  const int warp = threadIdx.x / kWarpSize;
  const T* const cos = call.cos + place.row * call.cos_stride;
  const T* const sin = call.sin + place.row * call.cos_stride;
  const T* const q =
      call.q + place.row * call.q_stride + int64_t{place.kv_head} * call.group * kDim;
  const T* const k = call.k + place.row * call.k_stride + int64_t{place.kv_head} * kDim;
  const T* const v = call.v + place.row * call.v_stride + int64_t{place.kv_head} * kDim;
  for (int head = kWarps - 1 - warp; head < call.group; head += kWarps)
    embed<kDim>(q + head * kDim, call.q_weight, cos, sin, call.eps, queries + head * kPitch<kDim>);
  for (int i = call.group * kPitch<kDim> + threadIdx.x; i < kMostHeads * kPitch<kDim>;
       i += kThreads)
    queries[i] = T{};  // rows of the product that stand for no head
  if (!writes) return;
  const int64_t at = int64_t{cache.last} * kDim;
  if (warp == 0) embed<kDim>(k, call.k_weight, cos, sin, call.eps, cache.keys + at);
  for (int i = threadIdx.x; i < kDim; i += kThreads) cache.values[at + i] = v[i];
}

template <typename T>
__device__ __forceinline__ Cache<T> cache_of(const Call<T>& call, const Place& place, int dim) {
  const int64_t head = int64_t{place.row} * call.kv_heads + place.kv_head;
  const int64_t asked = *call.position;
  const int last = static_cast<int>(asked < 0 ? 0 : asked < call.length ? asked : call.length - 1);
  return {call.keys + head * call.length * dim, call.values + head * call.length * dim,
          call.mask + int64_t{place.row} * call.mask_stride, last};
}

// Blocks that a multiprocessor's registers must hold: another one's loads are under way while one
// waits. Sixteen rows of sums leave room for one.
template <int kHalves>
constexpr int kBlocks = kHalves == 1 ? 2 : 1;

template <int kDim, int kHalves, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<kHalves>)
    decode_attention_kernel(const __grid_constant__ Call<T> call, int cluster) {
  GRACE_DYNAMIC_SHARED(shared);
  T* const queries = reinterpret_cast<T*>(shared);
  float* const parts = reinterpret_cast<float*>(shared + query_bytes<kDim>());
  const Place place(call.kv_heads, cluster);
  const int warp = threadIdx.x / kWarpSize;
  if (cluster > 1) cluster_arrive();  // this block runs
  if (!call.settled) wait_for_previous_kernel();

  const Cache<T> cache = cache_of(call, place, kDim);
  const int step = kTileKeys * kWarps * cluster;
  int first = kTileKeys * (warp * cluster + place.rank);
  Keys<kDim, T> keys;
  Values<kDim, T> values;
  const auto load = [&] {
    keys.load(cache, first);
    values.load(cache, first);
  };
  const bool early = first + kTileKeys <= cache.last;  // the new token is not among them
  if (early) load();
  if (call.settled) wait_for_previous_kernel();
  take_token<kDim>(call, place, cache.last / kTileKeys % cluster == place.rank, cache, queries);
  __syncthreads();  // the block that reads the new token's key is the one that wrote it
  if (!early && first <= cache.last) load();

  Sums<kDim, kHalves, T> sums;
#pragma unroll 1
  while (first <= cache.last) {
    float scores[2][4] = {};
    sums.score(queries, kPitch<kDim>, keys, scores);
    const unsigned seen = keys.seen;
    first += step;
    __syncwarp();  // no earlier: registers are scarce
    if (first <= cache.last) keys.load(cache, first);
    uint32_t weights[kHalves][2];
    sums.weigh(scores, seen, call.scale, weights);
    sums.add(weights, values);
    __syncwarp();
    if (first <= cache.last) values.load(cache, first);
  }
  store_part(sums, call.group, part_at(parts, warp, call.group, kDim));
  __syncthreads();

  T* const out =
      call.out + (int64_t{place.row} * call.kv_heads + place.kv_head) * call.group * kDim;
  const auto finish = [&](int, int i, const Total& total) {
    out[i] = from_float<T>(total.out / total.sum);
  };
  const int all = call.group * kDim;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (cluster > 1) {
    cluster_wait();  // all blocks run
    send<kDim>(parts, call.group, place.rank, cluster);
    cluster_barrier(cluster);
    // Elements i with i * cluster / all == rank.
    const int begin = ceil_div(all * place.rank, cluster);
    const int end = ceil_div(all * (place.rank + 1), cluster);
    merge<kDim>(parts, kWarps, cluster, call.group, begin, end, finish);
    return;
  }
#endif
  merge<kDim>(parts, 0, kWarps, call.group, 0, all, finish);
}

// --- launch --------------------------------------------------------------------------------------

// Blocks for a head: as many as keep the GPU busy, each with a tile for every warp. No more than
// multiprocessors, of which a cluster must find its number in one part of the GPU: a few clusters
// that came second would double the time.
int cluster_of(int64_t heads, int64_t length, const Device& device) {
  int cluster = 1;
  if (device.capability < 90) return cluster;
  while (2 * cluster <= kMostCluster && 2 * cluster * heads <= device.processors &&
         2 * cluster * kWarps * kTileKeys <= length)
    cluster *= 2;
  return cluster;
}

template <int kDim, int kHalves, typename T>
void launch_call(const Call<T>& call, int64_t rows, int device) {
  const int64_t heads = rows * call.kv_heads;
  const int cluster = cluster_of(heads, call.length, Device::of(device));
  LaunchShape shape = {dim3(static_cast<unsigned>(heads * cluster)), kThreads,
                       shared_bytes<kDim>(call.group, cluster)};
  shape.dependent = true;
  shape.cluster = static_cast<unsigned>(cluster);
  launch(decode_attention_kernel<kDim, kHalves, T>, shape, device, call, cluster);
}

template <int kDim, typename T>
void launch_dim(const Call<T>& call, int64_t rows, int device) {
  if (call.group <= 8) return launch_call<kDim, 1>(call, rows, device);
  launch_call<kDim, 2>(call, rows, device);
}

// Rows may lie apart; heads and elements may not.
Tensor in_rows(const Tensor& x) {
  const bool whole = x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2));
  return whole ? x : torch::stable::contiguous(x);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data<const T>(*tensor) : nullptr;
}

// Shapes and dtypes are checked in Python.
Tensor decode_attention_cuda(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                             const Tensor& cos, const Tensor& sin, const Tensor& keys,
                             const Tensor& values, const Tensor& position, const Tensor& mask,
                             const std::optional<Tensor>& q_weight,
                             const std::optional<Tensor>& k_weight, double eps, double scale,
                             bool settled) {
  const Tensor q = in_rows(q_in), k = in_rows(k_in), v = in_rows(v_in);
  const int64_t rows = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = keys.size(1);
  STD_TORCH_CHECK(dim == 64 || dim == 128, "decode_attention: dim must be 64 or 128, got ", dim);
  STD_TORCH_CHECK(kv_heads > 0 && heads <= kMostHeads * kv_heads && heads % kv_heads == 0,
                  "decode_attention: heads must be at most 16 a head of the cache, got ", heads,
                  " of ", kv_heads);
  STD_TORCH_CHECK(keys.size(2) < 1 << 30 && mask.stride(1) == 1,
                  "decode_attention: mask's rows must lie together, and length be below 2^30");
  const auto aligned = [](const Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  };
  STD_TORCH_CHECK(aligned(keys) && aligned(values),
                  "decode_attention: keys and values must be aligned to 16 bytes");
  Tensor out = torch::stable::new_empty(q, {rows, heads * dim});
  if (rows == 0) return out;
  const auto i = [](int64_t x) { return static_cast<int>(x); };
  const auto run = [&](auto element) {
    using T = decltype(element);
    const Call<T> call = {data<const T>(q),
                          data<const T>(k),
                          data<const T>(v),
                          q.stride(0),
                          k.stride(0),
                          v.stride(0),
                          data<const T>(cos),
                          data<const T>(sin),
                          cos.size(0) == 1 ? 0 : dim,
                          data<T>(keys),
                          data<T>(values),
                          data<const int64_t>(position),
                          data<const bool>(mask),
                          data_or_null<T>(q_weight),
                          data_or_null<T>(k_weight),
                          data<T>(out),
                          i(kv_heads),
                          i(heads / kv_heads),
                          i(keys.size(2)),
                          i(mask.stride(0)),
                          static_cast<float>(eps),
                          static_cast<float>(scale),
                          settled};
    if (dim == 64) return launch_dim<64>(call, rows, device_of(q));
    launch_dim<128>(call, rows, device_of(q));
  };
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "decode_attention: q must be float16 or bfloat16 on a GPU");
  dtype == ScalarType::BFloat16 ? run(bf16{}) : run(fp16{});
  return out;
}

}  // namespace
}  // namespace grace::decode_attention

GRACE_CUDA_KERNELS(m) {
  m.impl("decode_attention", TORCH_BOX(&grace::decode_attention::decode_attention_cuda));
}
