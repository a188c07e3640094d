// gated_dkd on CUDA: a block a row. Forward reads both logits once; backward reads both once and
// writes the gradient once.
#include "common/launch.h"
#include "common/warp.h"
#include "ops/gated_dkd/gated_dkd.h"

namespace grace::gated_dkd {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Elements that are loaded and stored together.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

template <typename T>
constexpr int kWide = 16 / sizeof(T);

template <int N, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  const auto loaded = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(loaded.at[i]);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Vector<T, N> rounded;
#pragma unroll
  for (int i = 0; i < N; ++i) rounded.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vector<T, N>*>(to) = rounded;
}

template <typename T>
__device__ __forceinline__ int64_t misalignment(const T* row) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) % kWide<T>;
}

// Shares `count` elements of rows among the block's threads: body.template operator()<N>(first) is
// for N elements from `first`, which lie at a multiple of 16 bytes where N > 1. A row of an odd
// vocabulary begins anywhere, so the rows are wide in the middle if all are `offset` elements past
// such a multiple, and single elements throughout (offset -1) if they differ.
template <typename T, typename Body>
__device__ __forceinline__ void for_each(int64_t count, int64_t offset, const Body& body) {
  int64_t begin = count, end = count;  // of the wide part
  if (offset >= 0) {
    begin = (kWide<T> - offset) % kWide<T>;
    if (begin > count) begin = count;
    end = begin + (count - begin) / kWide<T> * kWide<T>;
  }
  for (int64_t i = threadIdx.x; i < begin; i += kThreads) body.template operator()<1>(i);
  for (int64_t i = begin + threadIdx.x * kWide<T>; i < end; i += kThreads * kWide<T>)
    body.template operator()<kWide<T>>(i);
  for (int64_t i = end + threadIdx.x; i < count; i += kThreads) body.template operator()<1>(i);
}

// Sums of the block in every thread. Both partners of an exchange add the same two numbers, and
// warps are added in order, so the result is bitwise repeatable.
__device__ __forceinline__ StudentSums exchange(const StudentSums& sums, int lanes) {
  return {__shfl_xor_sync(kFullWarp, sums.max, lanes),
          __shfl_xor_sync(kFullWarp, sums.tempered, lanes),
          __shfl_xor_sync(kFullWarp, sums.plain, lanes)};
}

__device__ __forceinline__ TeacherSums exchange(const TeacherSums& sums, int lanes) {
  return {
      __shfl_xor_sync(kFullWarp, sums.max, lanes), __shfl_xor_sync(kFullWarp, sums.tempered, lanes),
      __shfl_xor_sync(kFullWarp, sums.plain, lanes), __shfl_xor_sync(kFullWarp, sums.depth, lanes),
      __shfl_xor_sync(kFullWarp, sums.cross, lanes)};
}

template <typename Sums>
__device__ __forceinline__ void block_merge(Sums& sums, Sums* scratch, const Settings& s) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) sums.merge(exchange(sums, lanes), s);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = sums;
  __syncthreads();
  sums = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) sums.merge(scratch[warp], s);
}

// Which parts of a row take part, from its label alone.
struct Part {
  bool known;      // the label is a class of the student
  bool distilled;  // and of the teacher
};

__device__ __forceinline__ Part part_of(int64_t label, int64_t classes, int64_t shared,
                                        int64_t ignore_index) {
  const bool known = label != ignore_index && label >= 0 && label < classes;
  return {known, known && label < shared};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gated_dkd_kernel(const T* student,       // [n, classes]
                     const T* teacher,       // [n, teacher_classes]
                     const int64_t* labels,  // [n]
                     float* loss,            // [n]
                     float* gate,            // [n]
                     float* cross_entropy,   // [n]
                     float* saved,           // [n, kSavedColumns]
                     int64_t classes, int64_t teacher_classes, int64_t ignore_index,
                     Settings settings) {
  __shared__ StudentSums student_scratch[kWarps];
  __shared__ StudentSums padding_scratch[kWarps];
  __shared__ TeacherSums teacher_scratch[kWarps];
  const int64_t row = blockIdx.x;
  const int64_t label = labels[row];
  const int64_t shared = classes < teacher_classes ? classes : teacher_classes;
  const Part part = part_of(label, classes, shared, ignore_index);
  Row result = {};

  if (part.known) {
    const T* z = student + row * classes;
    const T* w = teacher + row * teacher_classes;
    StudentSums rest = StudentSums::none();
    StudentSums padding = StudentSums::none();
    TeacherSums teacher_rest = TeacherSums::none();

    // 1. The classes that both have.
    const auto add_both = [&]<int N>(int64_t first) {
      float zs[N], ws[N];
      load(z + first, zs);
      load(w + first, ws);
      float student_max = -kInfinity, teacher_max = -kInfinity;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (first + i == label) zs[i] = ws[i] = -kInfinity;
        student_max = fmaxf(student_max, zs[i]);
        teacher_max = fmaxf(teacher_max, ws[i]);
      }
      rest.raise(student_max, settings);
      teacher_rest.raise(teacher_max, settings);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        rest.add(zs[i], settings);
        teacher_rest.add(ws[i], zs[i], settings);
      }
    };
    const int64_t offset = misalignment(z);
    for_each<T>(shared, offset == misalignment(w) ? offset : -1, add_both);

    // 2. The student's padding, for the cross-entropy.
    const auto add_student = [&]<int N>(int64_t first) {
      float zs[N];
      load(z + shared + first, zs);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        padding.raise(zs[i], settings);
        padding.add(zs[i], settings);
      }
    };
    for_each<T>(classes - shared, -1, add_student);

    // 3. The row's numbers.
    block_merge(rest, student_scratch, settings);
    block_merge(padding, padding_scratch, settings);
    block_merge(teacher_rest, teacher_scratch, settings);
    const float target = to_float(z[label]);
    if (part.distilled) {
      result = distill(rest, teacher_rest, target, to_float(w[label]), shared, settings);
      rest.raise(target, settings);
      rest.add(target, settings);
    }
    rest.merge(padding, settings);
    result.saved[kLogSumStudent] = log_sum(rest);
    result.cross_entropy = result.saved[kLogSumStudent] - target;
  } else if (label != ignore_index) {
    result.loss = result.cross_entropy = float_of_bits(0x7fc00000u);  // not a class: not a number
  }

  if (threadIdx.x != 0) return;
  loss[row] = result.loss;
  gate[row] = result.gate;
  cross_entropy[row] = result.cross_entropy;
  for (int i = 0; i < kSavedColumns; ++i) saved[row * kSavedColumns + i] = result.saved[i];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gated_dkd_backward_kernel(const float* grad_loss,           // [n]
                              const float* grad_cross_entropy,  // [n]
                              const T* student,                 // [n, classes]
                              const T* teacher,                 // [n, teacher_classes]
                              const int64_t* labels,            // [n]
                              const float* saved,               // [n, kSavedColumns]
                              T* grad_student,                  // [n, classes]
                              int64_t classes, int64_t teacher_classes, int64_t ignore_index,
                              Settings settings) {
  const int64_t row = blockIdx.x;
  const int64_t label = labels[row];
  const int64_t shared = classes < teacher_classes ? classes : teacher_classes;
  const Part part = part_of(label, classes, shared, ignore_index);
  const T* z = student + row * classes;
  const T* w = teacher + row * teacher_classes;
  T* out = grad_student + row * classes;
  const RowGradient gradient =
      row_gradient(saved + row * kSavedColumns, part.distilled ? grad_loss[row] : 0.0f,
                   part.known ? grad_cross_entropy[row] : 0.0f, settings);
  const bool with_cross_entropy = gradient.cross_entropy != 0.0f;
  const int64_t offset = misalignment(z);
  const bool aligned = offset == misalignment(out);

  // 1. Rows that take no part, and the student's padding: nothing of the teacher.
  const int64_t alone = part.distilled ? shared : 0;  // the first class without distillation
  const auto write_student = [&]<int N>(int64_t first) {
    float grads[N] = {};
    if (with_cross_entropy) {
      load(z + alone + first, grads);
#pragma unroll
      for (int i = 0; i < N; ++i)
        grads[i] = cross_entropy_gradient(grads[i], alone + first + i == label, gradient);
    }
    store(out + alone + first, grads);
  };
  for_each<T>(classes - alone, aligned ? (offset + alone) % kWide<T> : -1, write_student);

  // 2. The classes that both have.
  const auto write_both = [&]<int N>(int64_t first) {
    float zs[N], ws[N];
    load(z + first, zs);
    load(w + first, ws);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool is_target = first + i == label;
      const float distilled = distillation_gradient(zs[i], ws[i], is_target, gradient, settings);
      const float own =
          with_cross_entropy ? cross_entropy_gradient(zs[i], is_target, gradient) : 0.0f;
      zs[i] = distilled + own;
    }
    store(out + first, zs);
  };
  for_each<T>(alone, aligned && offset == misalignment(w) ? offset : -1, write_both);
}

Settings settings_of(double temperature, double alpha, double beta) {
  return {static_cast<float>(temperature), static_cast<float>(1.0 / temperature),
          static_cast<float>(alpha), static_cast<float>(beta)};
}

Tensor empty_float(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

LaunchShape shape_for(int64_t rows) { return {dim3(rows), kThreads}; }

// student [n, Vs] and teacher [n, Vt] of one dtype, labels int64 [n], contiguous: checked in
// Python.
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_dkd_cuda(const Tensor& student,
                                                          const Tensor& teacher,
                                                          const Tensor& labels, double temperature,
                                                          double alpha, double beta,
                                                          int64_t ignore_index) {
  const int64_t n = student.size(0);
  Tensor loss = empty_float(student, {n});
  Tensor gate = empty_float(student, {n});
  Tensor cross_entropy = empty_float(student, {n});
  Tensor saved = empty_float(student, {n, kSavedColumns});
  if (n == 0) return {loss, gate, cross_entropy, saved};
  dispatch_floating(student.scalar_type(), "gated_dkd", [&](auto element) {
    using T = decltype(element);
    launch(gated_dkd_kernel<T>, shape_for(n), device_of(student), data<T>(student),
           data<T>(teacher), data<int64_t>(labels), data<float>(loss), data<float>(gate),
           data<float>(cross_entropy), data<float>(saved), student.size(1), teacher.size(1),
           ignore_index, settings_of(temperature, alpha, beta));
  });
  return {loss, gate, cross_entropy, saved};
}

Tensor gated_dkd_backward_cuda(const Tensor& grad_loss, const Tensor& grad_cross_entropy,
                               const Tensor& student, const Tensor& teacher, const Tensor& labels,
                               const Tensor& saved, double temperature, double alpha, double beta,
                               int64_t ignore_index) {
  Tensor grad_student = torch::stable::empty_like(student);
  const int64_t n = student.size(0);
  if (n == 0) return grad_student;
  dispatch_floating(student.scalar_type(), "gated_dkd_backward", [&](auto element) {
    using T = decltype(element);
    launch(gated_dkd_backward_kernel<T>, shape_for(n), device_of(student), data<float>(grad_loss),
           data<float>(grad_cross_entropy), data<T>(student), data<T>(teacher),
           data<int64_t>(labels), data<float>(saved), data<T>(grad_student), student.size(1),
           teacher.size(1), ignore_index, settings_of(temperature, alpha, beta));
  });
  return grad_student;
}

}  // namespace
}  // namespace grace::gated_dkd

GRACE_CUDA_KERNELS(m) {
  m.impl("gated_dkd", TORCH_BOX(&grace::gated_dkd::gated_dkd_cuda));
  m.impl("gated_dkd_backward", TORCH_BOX(&grace::gated_dkd::gated_dkd_backward_cuda));
}
