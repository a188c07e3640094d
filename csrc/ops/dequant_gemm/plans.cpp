// The table of measured plans: rows (bits, n, k, most rows of x, plan) that Python hands over once.
#include "ops/dequant_gemm/plans.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <vector>

namespace grace::dequant_gemm {
namespace {

struct Row {
  int64_t bits, n, k, m, plan;
};

struct Table {
  std::shared_mutex mutex;
  std::vector<Row> rows;
  std::map<std::array<int64_t, 3>, std::vector<Row>> layers;  // (bits, n, k) -> rows, m rising
};

Table& table() {
  static Table table;
  return table;
}

double distance(const Row& row, int64_t n, int64_t k) {
  const auto apart = [](int64_t a, int64_t b) {
    return std::abs(std::log(static_cast<double>(a) / static_cast<double>(b)));
  };
  return apart(row.n, n) + apart(row.k, k);
}

// The rows of the most similar layer that was measured at this width, or at the other one where
// none was.
std::vector<Row> nearest_layer(const std::vector<Row>& rows, int64_t bits, int64_t n, int64_t k) {
  std::vector<Row> layer;
  if (std::none_of(rows.begin(), rows.end(), [&](const Row& row) { return row.bits == bits; }) &&
      !rows.empty())
    bits = rows[0].bits;
  for (const Row& row : rows) {
    if (row.bits != bits) continue;
    const bool same = !layer.empty() && row.n == layer[0].n && row.k == layer[0].k;
    if (!same && !layer.empty() && distance(row, n, k) >= distance(layer[0], n, k)) continue;
    if (!same) layer.clear();
    layer.push_back(row);
  }
  std::sort(layer.begin(), layer.end(), [](const Row& a, const Row& b) { return a.m < b.m; });
  return layer;
}

int64_t plan_for(const std::vector<Row>& layer, int64_t m) {
  for (const Row& row : layer)
    if (m <= row.m) return row.plan;
  return layer.empty() ? -1 : layer.back().plan;
}

void set_plans(const Tensor& rows) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.dim() == 2 && rows.size(1) == 5 &&
                      rows.is_contiguous(),
                  "dequant_gemm: plans must be int64 [rows, 5], contiguous");
  Table& t = table();
  const std::unique_lock lock(t.mutex);
  const auto* const begin = static_cast<const Row*>(rows.data_ptr());
  t.rows.assign(begin, begin + rows.size(0));
  t.layers.clear();
}

}  // namespace

int64_t measured_plan(int64_t bits, int64_t m, int64_t n, int64_t k) {
  Table& t = table();
  const std::array<int64_t, 3> key{bits, n, k};
  {
    const std::shared_lock lock(t.mutex);
    if (t.rows.empty()) return -1;
    if (const auto found = t.layers.find(key); found != t.layers.end())
      return plan_for(found->second, m);
  }
  const std::unique_lock lock(t.mutex);
  return plan_for(t.layers[key] = nearest_layer(t.rows, bits, n, k), m);
}

}  // namespace grace::dequant_gemm

// The emulated kernels have a table of their own.
#if defined(GRACE_EMULATE)
GRACE_CUDA_KERNELS(m) {
#else
GRACE_CPU_KERNELS(m) {
#endif
  m.impl("dequant_gemm_set_plans", TORCH_BOX(&grace::dequant_gemm::set_plans));
}
