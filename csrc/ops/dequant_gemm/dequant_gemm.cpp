// dequant_gemm on a CPU: checks, choice, and the kernel that runs everywhere.
#include <cstdlib>
#include <string_view>
#include <vector>

#include "ops/dequant_gemm/call.h"
#include "ops/dequant_gemm/dequant_gemm_cpu.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operands in its own AVX-512 header for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "ops/dequant_gemm/dequant_gemm_avx2.h"
#include "ops/dequant_gemm/dequant_gemm_avx512.h"
#include "ops/dequant_gemm/dequant_gemm_avx512bf16.h"
#if defined(__linux__)
#define GRACE_AMX
#include "ops/dequant_gemm/dequant_gemm_amx.h"
#endif
#endif

namespace grace::dequant_gemm {
namespace {

using torch::stable::parallel_for;

// --- the portable kernel: any CPU, any group size -----------------------------------------------

constexpr int kParts = 8;  // sums of a dot product that run side by side

// The codes of one row of the weight as floats, zeros up to a whole tile.
template <int kBits>
void decode_row(const uint32_t* qweight, int64_t k_tiles, int64_t row, float* codes) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  constexpr float kZero = 1 << (kBits - 1);
  const int r = static_cast<int>(row % kTile), gid = r % 8, r8 = r / 8 % 2;
  const uint32_t* band = qweight + row / kTile * k_tiles * Layout<kBits>::kTileWords +
                         r / kBand * Layout<kBits>::kBandWords;
  for (int64_t tile = 0; tile < k_tiles; ++tile) {
    for (int i = 0; i < kTile / 2; ++i) {  // pairs of neighbouring columns
      const int block = i / 8, c8 = i / 4 % 2, lane = gid * 4 + i % 4;
      const uint32_t pair = pair_at<kBits>(band, block, lane, c8, r8);
      codes[2 * i] = static_cast<float>(pair & kMask) - kZero;
      codes[2 * i + 1] = static_cast<float>(pair >> 16 & kMask) - kZero;
    }
    band += Layout<kBits>::kTileWords;
    codes += kTile;
  }
}

template <int kBits, typename T>
void dequantize_row(const Call<T>& call, int64_t row, float* weights) {
  const Problem& p = call.problem;
  decode_row<kBits>(call.qweight, p.k_tiles, row, weights);
  for (int64_t group = 0; group < p.groups(); ++group) {
    const float scale = call.scales.at(group, row);
    const int64_t end = std::min(p.k, (group + 1) * p.group_size);
    for (int64_t k = group * p.group_size; k < end; ++k) weights[k] *= scale;
  }
}

// Adds in one order, so that a row of x gives the same wherever it stands.
float dot(const float* weights, const float* x, int64_t k) {
  float parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= k; i += kParts)
    for (int j = 0; j < kParts; ++j) parts[j] += weights[i + j] * x[i + j];
  for (; i < k; ++i) parts[i % kParts] += weights[i] * x[i];
  float sum = 0.0f;
  for (const float part : parts) sum += part;
  return sum;
}

template <int kBits, typename T>
void run_portable(const Call<T>& call) {
  const Problem& p = call.problem;
  std::vector<float> x(std::min(p.m, kRowsOfX) * p.k);
  for (int64_t m = 0; m < p.m; m += kRowsOfX) {
    const int64_t rows = std::min(kRowsOfX, p.m - m);
    for (int64_t i = 0; i < rows * p.k; ++i) x[i] = to_float(call.x[m * p.k + i]);
    parallel_for(0, p.n, 8, [&](int64_t begin, int64_t end) {
      std::vector<float> weights(p.k_tiles * kTile);
      for (int64_t n = begin; n < end; ++n) {
        dequantize_row<kBits>(call, n, weights.data());
        const float bias = call.bias ? to_float(call.bias[n]) : 0.0f;
        for (int64_t i = 0; i < rows; ++i)
          call.out[(m + i) * p.n + n] =
              from_float<T>(dot(weights.data(), x.data() + i * p.k, p.k) + bias);
      }
    });
  }
}

// --- choice -------------------------------------------------------------------------------------

enum class Capability { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The most that GRACE_CPU_CAPABILITY allows, as ATEN_CPU_CAPABILITY does in PyTorch.
Capability allowed() {
  const char* const asked = std::getenv("GRACE_CPU_CAPABILITY");
  if (asked == nullptr || std::string_view(asked) == "amx") return Capability::kAmx;
  if (std::string_view(asked) == "avx512bf16") return Capability::kAvx512Bf16;
  if (std::string_view(asked) == "avx512") return Capability::kAvx512;
  if (std::string_view(asked) == "avx2") return Capability::kAvx2;
  STD_TORCH_CHECK(std::string_view(asked) == "default",
                  "GRACE_CPU_CAPABILITY must be default, avx2, avx512, avx512bf16 or amx, got ",
                  asked);
  return Capability::kPortable;
}

struct Run {
  template <int kBits, typename T>
  void operator()(const Call<T>& call) const {
    const Capability capability = allowed();
#if defined(GRACE_AMX)
    static const bool has_amx = amx::supported();
    if (has_amx && capability >= Capability::kAmx && in_bf16::takes(call.problem))
      return amx::run<kBits>(call);
#endif
#if defined(__x86_64__)
    static const bool has_bf16 = avx512bf16::supported();
    if (has_bf16 && capability >= Capability::kAvx512Bf16 && in_bf16::takes(call.problem))
      return avx512bf16::run<kBits>(call);
    static const bool has_avx512 = avx512::supported(), has_avx2 = avx2::supported();
    if (call.problem.whole_blocks()) {
      if (has_avx512 && capability >= Capability::kAvx512) return avx512::run<kBits>(call);
      if (has_avx2 && capability >= Capability::kAvx2) return avx2::run<kBits>(call);
    }
#endif
    run_portable<kBits>(call);
  }
};

Tensor dequant_gemm_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                        const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                        int64_t out_features, const std::optional<Tensor>& residual, bool swiglu,
                        int64_t plan, bool settled) {
  STD_TORCH_CHECK(!residual && !swiglu,
                  "dequant_gemm: residual and swiglu are added outside of the CPU kernels");
  STD_TORCH_CHECK(plan == -1, "dequant_gemm: plan must be -1 on a CPU, got ", plan);
  return run_on(
      {x, qweight, scales, bias, bits, group_size, out_features, residual, swiglu, settled}, Run{});
}

}  // namespace
}  // namespace grace::dequant_gemm

GRACE_CPU_KERNELS(m) { m.impl("dequant_gemm", TORCH_BOX(&grace::dequant_gemm::dequant_gemm_cpu)); }
