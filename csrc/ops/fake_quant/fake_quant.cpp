// fake_quant on CPUs: a group at a time, vectorized by the compiler for the machine it runs on.
#include "ops/fake_quant/fake_quant.h"

#include <algorithm>
#include <array>
#include <vector>

#include "common/dispatch.h"
#include "common/tensor.h"
#include "ops/fake_quant/arguments.h"

namespace grace::fake_quant {
namespace {

constexpr int kLanes = 16;  // partial sums of the scale's gradient: a fixed order of additions

// A group in fp32, in blocks that the compiler turns into vector instructions.
GRACE_CPU_CLONES void quantize_group(const float* weight, float* out, int64_t size, float scale,
                                     Codes codes) {
  for (int64_t i = 0; i < size; ++i) out[i] = fake_quantize(weight[i], scale, codes);
}

GRACE_CPU_CLONES float gradient_group(const float* grad, const float* weight, float* grad_weight,
                                      int64_t size, float scale, Codes codes) {
  std::array<float, kLanes> sums{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const Gradient g = gradient_of(grad[i + lane], weight[i + lane], scale, codes);
      grad_weight[i + lane] = g.weight;
      sums[lane] += g.log_scale;
    }
  for (; i < size; ++i) {
    const Gradient g = gradient_of(grad[i], weight[i], scale, codes);
    grad_weight[i] = g.weight;
    sums[0] += g.log_scale;
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

// fp32 views of a group of any element type; fp32 itself is used in place.
template <typename T>
struct Converted {
  std::vector<float> buffer;
  explicit Converted(int64_t size) : buffer(std::is_same_v<T, float> ? 0 : size) {}

  const float* read(const T* from, int64_t size) {
    if constexpr (std::is_same_v<T, float>) return from;
    for (int64_t i = 0; i < size; ++i) buffer[i] = to_float(from[i]);
    return buffer.data();
  }
  float* target(T* to) {
    if constexpr (std::is_same_v<T, float>) return to;
    return buffer.data();
  }
  void write(T* to, int64_t size) {
    if constexpr (!std::is_same_v<T, float>)
      for (int64_t i = 0; i < size; ++i) to[i] = from_float<T>(buffer[i]);
  }
};

struct Groups {
  int64_t count;
  int64_t size;
  int64_t grain;  // groups a thread takes at least
};

Groups groups_of(const Tensor& weight, const Tensor& log_scale) {
  const int64_t count = log_scale.numel();
  const int64_t size = count == 0 ? 0 : weight.numel() / count;
  return {count, size, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, size))};
}

Tensor fake_quant_cpu(const Tensor& weight, const Tensor& log_scale, int64_t bits,
                      int64_t /*group_size*/, std::optional<ScalarType> scale_dtype) {
  Tensor out = torch::stable::empty_like(weight);
  const Groups groups = groups_of(weight, log_scale);
  const ScaleGrid grid = grid_of(scale_dtype);
  const Codes codes = codes_of(static_cast<int>(bits));
  dispatch_floating(weight.scalar_type(), "fake_quant", [&](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, groups.count, groups.grain, [&](int64_t begin, int64_t end) {
      Converted<T> in(groups.size), result(groups.size);
      for (int64_t group = begin; group < end; ++group) {
        T* to = data<T>(out) + group * groups.size;
        const float scale = scale_of(data<float>(log_scale)[group], grid);
        quantize_group(in.read(data<T>(weight) + group * groups.size, groups.size),
                       result.target(to), groups.size, scale, codes);
        result.write(to, groups.size);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> fake_quant_backward_cpu(const Tensor& grad, const Tensor& weight,
                                                   const Tensor& log_scale, int64_t bits,
                                                   int64_t /*group_size*/,
                                                   std::optional<ScalarType> scale_dtype) {
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_log_scale = torch::stable::empty_like(log_scale);
  const Groups groups = groups_of(weight, log_scale);
  const ScaleGrid grid = grid_of(scale_dtype);
  const Codes codes = codes_of(static_cast<int>(bits));
  dispatch_floating(weight.scalar_type(), "fake_quant", [&](auto element) {
    using T = decltype(element);
    torch::stable::parallel_for(0, groups.count, groups.grain, [&](int64_t begin, int64_t end) {
      Converted<T> g(groups.size), w(groups.size), result(groups.size);
      for (int64_t group = begin; group < end; ++group) {
        const int64_t at = group * groups.size;
        T* to = data<T>(grad_weight) + at;
        const float scale = scale_of(data<float>(log_scale)[group], grid);
        data<float>(grad_log_scale)[group] = gradient_group(
            g.read(data<T>(grad) + at, groups.size), w.read(data<T>(weight) + at, groups.size),
            result.target(to), groups.size, scale, codes);
        result.write(to, groups.size);
      }
    });
  });
  return {grad_weight, grad_log_scale};
}

}  // namespace
}  // namespace grace::fake_quant

GRACE_CPU_KERNELS(m) {
  m.impl("fake_quant", TORCH_BOX(&grace::fake_quant::fake_quant_cpu));
  m.impl("fake_quant_backward", TORCH_BOX(&grace::fake_quant::fake_quant_backward_cpu));
}
