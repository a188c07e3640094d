// quantize_pack on CUDA: a block quantizes 64 rows x 128 columns, two tiles of the packed layout.
//
//   weight --16-byte loads, coalesced along rows--> registers --quotients--> offset codes, a byte
//   each, in shared memory [64][136] --pairs of neighbours--> words, 16 bytes a lane, coalesced
//
// Scales are made first, one a row and group: for the block's own weights, and, by the block in
// which a group begins, for the packed scales.
#include "common/vectors.h"
#include "ops/dequant_gemm/dequant_gemm.h"
#include "ops/fake_quant/arguments.h"
#include "ops/quantize_pack/quantize_pack.h"

namespace grace::quantize_pack {
namespace {

using dequant_gemm::kBlock;
using dequant_gemm::kTile;
using dequant_gemm::Layout;
using fake_quant::Codes;
using fake_quant::Divisor;
using fake_quant::ScaleGrid;

constexpr int kThreads = 256;
constexpr int kRows = kTile, kColumns = 2 * kTile;
constexpr int kPitch = kColumns + 8;  // bytes: eight rows of pairs then lie in different banks
constexpr int kMostGroups = 8;        // of a row that a block holds the divisors of

template <typename T>
struct Call {
  const T* weight;         // [n, k]
  const float* log_scale;  // [n, groups]
  uint32_t* qweight;       // [n_tiles, k_tiles, words of a tile]
  void* scales;            // [groups, 64 * n_tiles] on the grid's dtype
  int64_t n, k, n_tiles, k_tiles;
  int64_t groups, group_size;
  Codes codes;
  ScaleGrid grid;

  // Whether vectors can be loaded whole, each with one scale out of few that a block holds.
  bool in_vectors() const {
    const int64_t touched =
        kColumns % group_size == 0 ? kColumns / group_size : (kColumns - 2) / group_size + 2;
    return is_vector_aligned(weight) && k % kPerVector<T> == 0 && group_size % kPerVector<T> == 0 &&
           touched <= kMostGroups;
  }
};

struct Shared {
  alignas(16) unsigned char codes[kRows][kPitch];
  Divisor divisors[kMostGroups][kRows];
};

// What a block works on.
template <typename T>
struct Place {
  int64_t row, column, first_group;
  int touched;      // groups that the block has columns of
  unsigned before;  // columns of the first group that lie before the block

  __device__ explicit Place(const Call<T>& call)
      : row(int64_t{blockIdx.y} * kRows), column(int64_t{blockIdx.x} * kColumns) {
    const int64_t end = column + kColumns < call.k ? column + kColumns : call.k;
    first_group = column / call.group_size;
    touched = static_cast<int>((end - 1) / call.group_size + 1 - first_group);
    before = static_cast<unsigned>(column - first_group * call.group_size);
  }

  // The group of a column of the block, counted from the first.
  __device__ unsigned slot(const Call<T>& call, int c) const {
    return touched == 1 ? 0 : (before + c) / static_cast<unsigned>(call.group_size);
  }
};

template <typename T>
__device__ __forceinline__ float scale_at(const Call<T>& call, int64_t row, int64_t group) {
  return fake_quant::scale_of(__ldg(call.log_scale + row * call.groups + group), call.grid);
}

template <typename T>
__device__ __forceinline__ void store_scale(const Call<T>& call, int64_t row, int64_t group,
                                            float scale) {
  const int64_t at = group * call.n_tiles * kTile + row;
  if (call.grid == ScaleGrid::kBFloat16) {
    static_cast<bf16*>(call.scales)[at] = from_float<bf16>(scale);
  } else if (call.grid == ScaleGrid::kFloat16) {
    static_cast<fp16*>(call.scales)[at] = from_float<fp16>(scale);
  } else {
    static_cast<float*>(call.scales)[at] = scale;
  }
}

template <typename T, bool kVectors>
__device__ __forceinline__ void make_scales(const Call<T>& call, const Place<T>& place,
                                            Shared& shared) {
  for (int i = threadIdx.x; i < place.touched * kRows; i += kThreads) {
    const int r = i % kRows, slot = i / kRows;
    const int64_t row = place.row + r, group = place.first_group + slot;
    const bool inside = row < call.n;
    const float scale = inside ? scale_at(call, row, group) : 1.0f;
    if constexpr (kVectors) shared.divisors[slot][r] = fake_quant::divisor_of(scale);
    if (group * call.group_size >= place.column)
      store_scale(call, row, group, inside ? scale : 0.0f);
  }
}

// --- weights to bytes ----------------------------------------------------------------------------

template <int kBits>
constexpr uint32_t kZeros = kBits == 4 ? 0x08080808u : 0x80808080u;  // four codes of zero

// A NaN must not reach its neighbours.
template <int kBits>
__device__ __forceinline__ uint32_t four_bytes(const uint32_t (&codes)[4]) {
  const uint32_t bytes = low_bytes(codes[0], codes[1], codes[2], codes[3]);
  return kBits == 4 ? bytes & 0x0f0f0f0fu : bytes;
}

__device__ __forceinline__ uint32_t irregular_code(float weight, float scale, Codes codes) {
  return fake_quant::offset_code(fake_quant::clamp_code(rintf(weight / scale), codes), codes);
}

// By division: called, so that the way that is taken stays short.
template <int kBits>
__device__ __noinline__ uint32_t four_irregular_codes(float4 x, float scale, Codes codes) {
  return four_bytes<kBits>({irregular_code(x.x, scale, codes), irregular_code(x.y, scale, codes),
                            irregular_code(x.z, scale, codes), irregular_code(x.w, scale, codes)});
}

template <int kBits>
__device__ __forceinline__ uint32_t four_codes(const float* x, const Divisor& by, Codes codes) {
  if (!by.regular()) return four_irregular_codes<kBits>({x[0], x[1], x[2], x[3]}, by.scale, codes);
  uint32_t one[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    one[i] = fake_quant::offset_code(fake_quant::value_within(x[i], by, codes), codes);
  return four_bytes<kBits>(one);
}

// A thread's vectors, four of them in flight at a time.
template <typename T, int kBits>
__device__ __forceinline__ void quantize_vectors(const Call<T>& call, const Place<T>& place,
                                                 Shared& shared) {
  constexpr int kPer = kPerVector<T>, kAcross = kColumns / kPer, kFlight = 4;
  constexpr int kRounds = kRows * kAcross / (kThreads * kFlight);
  uint4 vectors[kFlight];
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int first = round * kFlight * kThreads + static_cast<int>(threadIdx.x);
    const auto inside = [&](int r, int c) {
      return place.row + r < call.n && place.column + c < call.k;
    };
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      const int i = first + j * kThreads, r = i / kAcross, c = i % kAcross * kPer;
      vectors[j] = inside(r, c)
                       ? load_vector(call.weight + (place.row + r) * call.k + place.column + c)
                       : uint4{0, 0, 0, 0};
    }
    if (round == 0) {  // while the first weights are on their way
      make_scales<T, true>(call, place, shared);
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      const int i = first + j * kThreads, r = i / kAcross, c = i % kAcross * kPer;
      float x[kPer];
      unpack_vector<T>(vectors[j], x);
      const bool real = inside(r, c);
      const Divisor by = shared.divisors[real ? place.slot(call, c) : 0][r];
#pragma unroll
      for (int part = 0; part < kPer; part += 4) {
        const uint32_t bytes = four_codes<kBits>(x + part, by, call.codes);
        *reinterpret_cast<uint32_t*>(&shared.codes[r][c + part]) = real ? bytes : kZeros<kBits>;
      }
    }
  }
}

// Any group size, any columns, any alignment: an element at a time.
template <typename T, int kBits>
__device__ __forceinline__ void quantize_elements(const Call<T>& call, const Place<T>& place,
                                                  Shared& shared) {
  make_scales<T, false>(call, place, shared);
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
    const int r = i / kColumns, c = i % kColumns;
    const int64_t row = place.row + r, column = place.column + c;
    uint32_t code = kZeros<kBits>;
    if (row < call.n && column < call.k) {
      const Divisor by = fake_quant::divisor_of(scale_at(call, row, column / call.group_size));
      const float weight = to_float(call.weight[row * call.k + column]);
      const float same[4] = {weight, weight, weight, weight};
      code = four_codes<kBits>(same, by, call.codes);
    }
    shared.codes[r][c] = static_cast<unsigned char>(code & ((1u << kBits) - 1));
  }
}

// --- bytes to words ------------------------------------------------------------------------------

// Of the block of 16 x 16 codes that begins there.
__device__ __forceinline__ Pairs pairs_of(const Shared& shared, int row, int column, int lane) {
  Pairs pairs;
#pragma unroll
  for (int c8 = 0; c8 < 2; ++c8)
#pragma unroll
    for (int r8 = 0; r8 < 2; ++r8)
      pairs.at[c8][r8] = *reinterpret_cast<const uint16_t*>(
          &shared.codes[row + lane / 4 + 8 * r8][column + lane % 4 * 2 + 8 * c8]);
  return pairs;
}

// Four words that a lane reads together: at 4 bits the blocks of a band, at 8 bits half of them.
template <int kBits>
__device__ __forceinline__ uint4 words_of(const Shared& shared, int row, int column, int lane) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int block = kBits == 4 ? i : i / 2;
    const Pairs pairs = pairs_of(shared, row, column + block * kBlock, lane);
    words[i] = kBits == 4 ? word_4(pairs) : word_8(pairs, i % 2);
  }
  return {words[0], words[1], words[2], words[3]};
}

template <typename T, int kBits>
__device__ __forceinline__ void store_words(const Call<T>& call, const Place<T>& place,
                                            const Shared& shared) {
  constexpr int kVectors = Layout<kBits>::kTileWords / 4;  // of a tile
  constexpr int kBandVectors = Layout<kBits>::kBandWords / 4;
  for (int i = threadIdx.x; i < 2 * kVectors; i += kThreads) {
    const int tile = i / kVectors, at = i % kVectors;
    const int64_t k_tile = place.column / kTile + tile;
    if (k_tile >= call.k_tiles) return;
    const int row = at / kBandVectors * dequant_gemm::kBand;
    const int column = tile * kTile + at % kBandVectors / kWarpSize * (kTile / 2);
    const uint4 words = words_of<kBits>(shared, row, column, at % kWarpSize);
    const int64_t to = (int64_t{blockIdx.y} * call.k_tiles + k_tile) * kVectors + at;
    store_vector(call.qweight + to * 4, words);
  }
}

template <typename T, int kBits, bool kVectors>
__global__ void __launch_bounds__(kThreads) quantize_pack_kernel(Call<T> call) {
  __shared__ Shared shared;
  const Place<T> place(call);
  if constexpr (kVectors) {
    quantize_vectors<T, kBits>(call, place, shared);
  } else {
    quantize_elements<T, kBits>(call, place, shared);
  }
  __syncthreads();
  store_words<T, kBits>(call, place, shared);
}

// --- launch --------------------------------------------------------------------------------------

template <typename T, int kBits>
void launch_call(const Call<T>& call, int device) {
  const LaunchShape shape = {dim3(static_cast<unsigned>(ceil_div<int64_t>(call.k_tiles, 2)),
                                  static_cast<unsigned>(call.n_tiles)),
                             kThreads};
  launch(call.in_vectors() ? quantize_pack_kernel<T, kBits, true>
                           : quantize_pack_kernel<T, kBits, false>,
         shape, device, call);
}

// weight [N, K] and log_scale fp32 [N, K / group_size], contiguous: checked in Python.
std::tuple<Tensor, Tensor> quantize_pack_cuda(const Tensor& weight, const Tensor& log_scale,
                                              int64_t bits, int64_t /*group_size*/,
                                              std::optional<ScalarType> scale_dtype) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "quantize_pack: bits must be 4 or 8");
  STD_TORCH_CHECK(weight.size(1) > 0, "quantize_pack: weight must have at least one column");
  const int64_t n = weight.size(0), k = weight.size(1), groups = log_scale.size(1);
  const int64_t n_tiles = ceil_div<int64_t>(n, kTile), k_tiles = ceil_div<int64_t>(k, kTile);
  STD_TORCH_CHECK(n_tiles < 65536, "quantize_pack: weight must have less than 4194304 rows");
  Tensor qweight =
      torch::stable::new_empty(weight, {n_tiles, k_tiles, 128 * bits}, ScalarType::Int);
  Tensor scales = torch::stable::new_empty(weight, {groups, n_tiles * kTile},
                                           scale_dtype.value_or(ScalarType::Float));
  if (n == 0) return {qweight, scales};
  dispatch_floating(weight.scalar_type(), "quantize_pack", [&](auto element) {
    using T = decltype(element);
    const Call<T> call = {data<const T>(weight),
                          data<const float>(log_scale),
                          data<uint32_t>(qweight),
                          scales.data_ptr(),
                          n,
                          k,
                          n_tiles,
                          k_tiles,
                          groups,
                          k / groups,
                          fake_quant::codes_of(static_cast<int>(bits)),
                          fake_quant::grid_of(scale_dtype)};
    const auto run = bits == 4 ? launch_call<T, 4> : launch_call<T, 8>;
    run(call, device_of(weight));
  });
  return {qweight, scales};
}

}  // namespace
}  // namespace grace::quantize_pack

GRACE_CUDA_KERNELS(m) {
  m.impl("quantize_pack", TORCH_BOX(&grace::quantize_pack::quantize_pack_cuda));
}
