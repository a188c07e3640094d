// dequant_gemm on a CPU: checks, choice, and the kernel that runs everywhere.
#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "ops/dequant_gemm/call.h"
#include "ops/dequant_gemm/dequant_gemm.h"

#if defined(__x86_64__)
#include "ops/dequant_gemm/dequant_gemm_avx2.h"
#endif

namespace grace::dequant_gemm {
namespace {

using torch::stable::parallel_for;

// --- the portable kernel: any CPU, any group size -----------------------------------------------

constexpr int64_t kRowsAtOnce = 64;  // rows of x for which a weight is dequantized once
constexpr int kParts = 8;            // partial sums of a dot product: what a compiler vectorizes

template <int kBits, typename T>
void dequantize_row(const Call<T>& call, int64_t row, float* weights) {
  const Problem& p = call.problem;
  for (int64_t k = 0; k < p.k; ++k) {
    const int code = code_at<kBits>(call.qweight, p.k_tiles, row, k);
    weights[k] = static_cast<float>(code) * call.scales.at(k / p.group_size, row);
  }
}

// Adds in the same order for every row of x.
template <typename T>
float dot(const float* weights, const T* x, int64_t k) {
  float parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= k; i += kParts)
    for (int j = 0; j < kParts; ++j) parts[j] += weights[i + j] * to_float(x[i + j]);
  for (; i < k; ++i) parts[i % kParts] += weights[i] * to_float(x[i]);
  float sum = 0.0f;
  for (const float part : parts) sum += part;
  return sum;
}

template <int kBits, typename T>
void run_portable(const Call<T>& call) {
  const Problem& p = call.problem;
  parallel_for(0, p.n, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> weights(p.k);
    for (int64_t row = begin; row < end; ++row) {
      dequantize_row<kBits>(call, row, weights.data());
      for (int64_t m = 0; m < p.m; ++m) {
        const float sum = dot(weights.data(), call.x + m * p.k, p.k);
        call.out[m * p.n + row] = from_float<T>(call.bias ? sum + to_float(call.bias[row]) : sum);
      }
    }
  });
}

// --- choice -------------------------------------------------------------------------------------

// GRACE_CPU_CAPABILITY=default keeps to the portable kernel, as ATEN_CPU_CAPABILITY does in
// PyTorch.
bool use_avx2(const Problem& p) {
  const char* const asked = std::getenv("GRACE_CPU_CAPABILITY");
  if (asked != nullptr && std::string_view(asked) == "default") return false;
  STD_TORCH_CHECK(asked == nullptr || std::string_view(asked) == "avx2",
                  "GRACE_CPU_CAPABILITY must be default or avx2, got ", asked);
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                __builtin_cpu_supports("f16c");
  return supported && p.whole_blocks();
#else
  return false;
#endif
}

struct Run {
  template <int kBits, typename T>
  void operator()(const Call<T>& call) const {
#if defined(__x86_64__)
    if (use_avx2(call.problem)) return avx2::run<kBits>(call);
#endif
    run_portable<kBits>(call);
  }
};

Tensor dequant_gemm_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                        const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                        int64_t out_features) {
  return run_on({x, qweight, scales, bias, bits, group_size, out_features}, Run{});
}

}  // namespace
}  // namespace grace::dequant_gemm

GRACE_CPU_KERNELS(m) { m.impl("dequant_gemm", TORCH_BOX(&grace::dequant_gemm::dequant_gemm_cpu)); }
