// The tables of measured plans, one a GPU, that Python hands over once: rows (number of the GPU,
// bits, n, k, most rows of x, plan).
#include "ops/dequant_gemm/plans.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <utility>
#include <vector>

namespace grace::dequant_gemm {
namespace {

struct Row {
  int64_t gpu, bits, n, k, m, plan;
};

struct Table {
  std::string gpu;
  std::vector<Row> rows;
  std::map<std::array<int64_t, 3>, std::vector<Row>> layers;  // (bits, n, k) -> rows, m rising
};

struct Tables {
  std::shared_mutex mutex;
  std::vector<Table> all;

  Table* of(const std::string& gpu) {
    const auto alike = [&](const Table& table) {
      const auto length = static_cast<std::ptrdiff_t>(std::min(gpu.size(), table.gpu.size()));
      return std::mismatch(gpu.begin(), gpu.begin() + length, table.gpu.begin()).first -
             gpu.begin();
    };
    const auto best = std::max_element(all.begin(), all.end(), [&](const Table& a, const Table& b) {
      return alike(a) < alike(b);
    });
    return best == all.end() || best->rows.empty() ? nullptr : &*best;
  }
};

Tables& tables() {
  static Tables tables;
  return tables;
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

// `gpus`: a name a line. Replaces all tables.
void set_plans(const std::string& gpus, const Tensor& rows) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.dim() == 2 && rows.size(1) == 6 &&
                      rows.is_contiguous(),
                  "dequant_gemm: plans must be int64 [rows, 6], contiguous");
  std::vector<Table> all;
  std::istringstream names(gpus);
  for (std::string name; std::getline(names, name);) all.push_back({name, {}, {}});
  const auto* const begin = static_cast<const Row*>(rows.data_ptr());
  for (const Row* row = begin; row != begin + rows.size(0); ++row) {
    STD_TORCH_CHECK(row->gpu >= 0 && row->gpu < static_cast<int64_t>(all.size()),
                    "dequant_gemm: a plan's GPU must be one of ", all.size(), ", got ", row->gpu);
    all[static_cast<size_t>(row->gpu)].rows.push_back(*row);
  }
  Tables& t = tables();
  const std::unique_lock lock(t.mutex);
  t.all = std::move(all);
}

}  // namespace

int64_t measured_plan(const std::string& gpu, int64_t bits, int64_t m, int64_t n, int64_t k) {
  Tables& t = tables();
  const std::array<int64_t, 3> key{bits, n, k};
  {
    const std::shared_lock lock(t.mutex);
    const Table* const table = t.of(gpu);
    if (table == nullptr) return -1;
    if (const auto found = table->layers.find(key); found != table->layers.end())
      return plan_for(found->second, m);
  }
  const std::unique_lock lock(t.mutex);
  Table* const table = t.of(gpu);
  if (table == nullptr) return -1;
  return plan_for(table->layers[key] = nearest_layer(table->rows, bits, n, k), m);
}

}  // namespace grace::dequant_gemm

// The emulated kernels have tables of their own.
#if defined(GRACE_EMULATE)
GRACE_CUDA_KERNELS(m) {
#else
GRACE_CPU_KERNELS(m) {
#endif
  m.impl("dequant_gemm_set_plans", TORCH_BOX(&grace::dequant_gemm::set_plans));
}
