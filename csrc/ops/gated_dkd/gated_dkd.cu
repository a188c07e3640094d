// gated_dkd on CUDA. Forward: a block a row, both logits read once. Backward: a block a part of a
// row, both logits read once and the gradient written once.
#include "ops/gated_dkd/gated_dkd.h"

#include <type_traits>

#include "ops/gated_dkd/sums.h"

namespace grace::gated_dkd {
namespace {

constexpr int kBlocksPerSm = 4;      // 64 registers a thread
constexpr int kPartClasses = 32768;  // of a row, that a block of the backward does

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

// --- forward -------------------------------------------------------------------------------------

template <bool kSquare, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gated_dkd_kernel(const T* student,       // [n, classes]
                     const T* teacher,       // [n, teacher_classes]
                     const int64_t* labels,  // [n]
                     float* loss,            // [n]
                     float* gate,            // [n]
                     float* cross_entropy,   // [n]
                     float* saved,           // [n, kSavedColumns]
                     int classes, int teacher_classes, int64_t ignore_index, Settings settings) {
  __shared__ Scratch scratch;
  const int64_t row = blockIdx.x;
  const int64_t label = labels[row];
  const int shared = classes < teacher_classes ? classes : teacher_classes;
  const Part part = part_of(label, classes, shared, ignore_index);
  Row result = {};

  if (part.known) {
    const Line<T> line = {student + row * classes, teacher + row * teacher_classes, classes, shared,
                          static_cast<int>(label)};
    result.loss = kInfinity;
    if (settings.temperature >= kMinTemperature)
      result = row_of(sums_of<kSquare>(line, scratch, settings), line, part.distilled, settings);
    if (!all_finite(result))  // the same in all threads
      result = row_of(careful_sums_of(line, scratch, settings), line, part.distilled, settings);
  } else if (label != ignore_index) {
    result.loss = result.cross_entropy = float_of_bits(0x7fc00000u);  // not a class: not a number
  }

  if (threadIdx.x != 0) return;
  loss[row] = result.loss;
  gate[row] = result.gate;
  cross_entropy[row] = result.cross_entropy;
  for (int i = 0; i < kSavedColumns; ++i) saved[row * kSavedColumns + i] = result.saved[i];
}

// --- backward ------------------------------------------------------------------------------------

// Which columns of the whole logits a call has.
struct Slice {
  int64_t first;
  int64_t classes;  // of the student in all
  int64_t shared;   // with the teacher in all
};

// Gradients of the cross-entropy alone, or of nothing, at all the line's classes.
template <typename T>
__device__ __forceinline__ void write_student(const Line<T>& line, T* out,
                                              const RowGradient& gradient, float at_target) {
  const bool any = gradient.cross_entropy != 0.0f;
  const auto load_student = [&]<int N>(int first) {
    return any ? load<N>(line.student + first) : Vector<T, N>{};
  };
  const auto write = [&]<int N>(int first, const Vector<T, N>& loaded) {
    float grads[N];
    unpack(loaded, grads);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      grads[i] = any ? cross_entropy_gradient(grads[i], gradient) : 0.0f;
      if (first + i == line.target) grads[i] = at_target;
    }
    store(out + first, grads);
  };
  const int offset = misalignment(out);
  const bool even = !any || offset == misalignment(line.student);
  for_each<T>(line.classes, even ? offset : kUneven, load_student, write);
}

// Gradients of everything, at the line's shared classes.
template <bool kSquare, bool kCrossEntropy, typename T>
__device__ __forceinline__ void write_both(const Line<T>& line, T* out, const RowGradient& gradient,
                                           float at_target, const Settings& s) {
  for_shared(line, out, [&]<int N>(int first, float (&z)[N], float (&w)[N]) {
    float grads[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      grads[i] = gradient_of<kSquare, kCrossEntropy>(z[i], w[i], gradient, s);
    if (static_cast<unsigned>(line.target - first) < N) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (first + i == line.target) grads[i] = at_target;
    }
    store(out + first, grads);
  });
}

// The line's classes [first, last).
template <typename T>
__device__ __forceinline__ Line<T> cut(const Line<T>& line, int first, int last) {
  return {line.student + first, line.teacher + first, last - first, last - first,
          line.target - first};
}

// grad_student may be student: no thread reads an element that another one writes, but the target,
// which all read first.
template <bool kSquare, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gated_dkd_backward_kernel(const float* grad_loss,           // [n]
                              const float* grad_cross_entropy,  // [n]
                              const T* student,                 // [n, columns]
                              const T* teacher,                 // [n, teacher_columns]
                              const int64_t* labels,            // [n]
                              const float* saved,               // [n, kSavedColumns]
                              T* grad_student,                  // [n, columns]
                              int columns, int teacher_columns, int parts, Slice slice,
                              int64_t ignore_index, Settings settings) {
  // The last rows first: of those the cache may still hold what the forward read.
  const int64_t row = (gridDim.x - 1 - blockIdx.x) / parts;
  const int begin = static_cast<int>(blockIdx.x % parts) * kPartClasses;
  const int end = columns - begin < kPartClasses ? columns : begin + kPartClasses;
  const int64_t label = labels[row];
  const Part part = part_of(label, slice.classes, slice.shared, ignore_index);
  const float row_loss = grad_loss[row], row_cross_entropy = grad_cross_entropy[row];
  const float loss_weight = part.distilled ? row_loss : 0.0f;
  const RowGradient gradient = row_gradient(saved + row * kSavedColumns, loss_weight,
                                            part.known ? row_cross_entropy : 0.0f, settings);
  const T* z = student + row * columns;
  T* out = grad_student + row * columns;

  // 1. The target, if it is in this part, which is the same for the whole block.
  const int64_t column = part.known ? label - slice.first : -1;
  const int target = column >= begin && column < end ? static_cast<int>(column) : columns;
  float at_target = 0.0f;
  if (target < columns) {
    at_target = target_gradient(to_float(z[target]), gradient);
    __syncthreads();
  }

  // 2. The teacher has a say below `both`, if it has one in this row.
  int64_t both = loss_weight != 0.0f ? slice.shared - slice.first : 0;
  both = both < begin ? begin : both > end ? end : both;
  const Line<T> line = {z, teacher + row * teacher_columns, columns, columns, target};
  const Line<T> first = cut(line, begin, static_cast<int>(both));
  if (gradient.cross_entropy != 0.0f)
    write_both<kSquare, true>(first, out + begin, gradient, at_target, settings);
  else
    write_both<kSquare, false>(first, out + begin, gradient, at_target, settings);
  write_student(cut(line, static_cast<int>(both), end), out + both, gradient, at_target);
}

// --- launches ------------------------------------------------------------------------------------

Settings settings_of(double temperature, double alpha, double beta) {
  return {static_cast<float>(temperature), static_cast<float>(1.0 / temperature),
          static_cast<float>(1.4426950408889634074 / temperature), static_cast<float>(alpha),
          static_cast<float>(beta)};
}

Tensor empty_float(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

int classes_of(const Tensor& logits) {
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(logits.size(1) <= kMost, "gated_dkd: logits must have at most 2^30 classes");
  return static_cast<int>(logits.size(1));
}

// Calls f with a value of the element type and std::true_type where T = 2.
template <typename F>
void dispatch(const Tensor& logits, double temperature, const char* op, F&& f) {
  dispatch_floating(logits.scalar_type(), op, [&](auto element) {
    if (temperature == 2.0)
      f(element, std::true_type{});
    else
      f(element, std::false_type{});
  });
}

// student [n, Vs] and teacher [n, Vt] of one dtype, labels int64 [n], contiguous: checked in
// Python.
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_dkd_cuda(const Tensor& student,
                                                          const Tensor& teacher,
                                                          const Tensor& labels, double temperature,
                                                          double alpha, double beta,
                                                          int64_t ignore_index, bool /*in_place*/) {
  const int64_t n = student.size(0);
  Tensor loss = empty_float(student, {n});
  Tensor gate = empty_float(student, {n});
  Tensor cross_entropy = empty_float(student, {n});
  Tensor saved = empty_float(student, {n, kSavedColumns});
  if (n == 0) return {loss, gate, cross_entropy, saved};
  dispatch(student, temperature, "gated_dkd", [&](auto element, auto square) {
    using T = decltype(element);
    launch(gated_dkd_kernel<square(), T>, {dim3(n), kThreads}, device_of(student), data<T>(student),
           data<T>(teacher), data<int64_t>(labels), data<float>(loss), data<float>(gate),
           data<float>(cross_entropy), data<float>(saved), classes_of(student), classes_of(teacher),
           ignore_index, settings_of(temperature, alpha, beta));
  });
  return {loss, gate, cross_entropy, saved};
}

// The gradient in the columns `slice` of the student's logits, to `out`.
struct Backward {
  const Tensor& grad_loss;
  const Tensor& grad_cross_entropy;
  const Tensor& student;
  const Tensor& teacher;
  const Tensor& labels;
  const Tensor& saved;

  void operator()(const Tensor& out, Slice slice, double temperature, double alpha, double beta,
                  int64_t ignore_index) const {
    const int columns = classes_of(student);
    const int parts = ceil_div(columns, kPartClasses);
    const int64_t blocks = student.size(0) * parts;
    if (blocks == 0) return;
    dispatch(student, temperature, "gated_dkd_backward", [&](auto element, auto square) {
      using T = decltype(element);
      launch(gated_dkd_backward_kernel<square(), T>, {dim3(blocks), kThreads}, device_of(student),
             data<float>(grad_loss), data<float>(grad_cross_entropy), data<T>(student),
             data<T>(teacher), data<int64_t>(labels), data<float>(saved), data<T>(out), columns,
             classes_of(teacher), parts, slice, ignore_index,
             settings_of(temperature, alpha, beta));
    });
  }
};

Tensor gated_dkd_backward_cuda(const Tensor& grad_loss, const Tensor& grad_cross_entropy,
                               const Tensor& student, const Tensor& teacher, const Tensor& labels,
                               const Tensor& saved, double temperature, double alpha, double beta,
                               int64_t ignore_index) {
  Tensor grad_student = torch::stable::empty_like(student);
  const int64_t classes = student.size(1), teacher_classes = teacher.size(1);
  const Slice whole = {0, classes, classes < teacher_classes ? classes : teacher_classes};
  const Backward backward = {grad_loss, grad_cross_entropy, student, teacher, labels, saved};
  backward(grad_student, whole, temperature, alpha, beta, ignore_index);
  return grad_student;
}

// Classes `first` and on of whole logits of so many classes, the gradient in the student's place.
void gated_dkd_backward_in_place_cuda(const Tensor& grad_loss, const Tensor& grad_cross_entropy,
                                      const Tensor& student, const Tensor& teacher,
                                      const Tensor& labels, const Tensor& saved, double temperature,
                                      double alpha, double beta, int64_t ignore_index,
                                      int64_t first, int64_t classes, int64_t shared) {
  const Backward backward = {grad_loss, grad_cross_entropy, student, teacher, labels, saved};
  backward(student, {first, classes, shared}, temperature, alpha, beta, ignore_index);
}

}  // namespace
}  // namespace grace::gated_dkd

GRACE_CUDA_KERNELS(m) {
  m.impl("gated_dkd", TORCH_BOX(&grace::gated_dkd::gated_dkd_cuda));
  m.impl("gated_dkd_backward", TORCH_BOX(&grace::gated_dkd::gated_dkd_backward_cuda));
  m.impl("gated_dkd_backward_", TORCH_BOX(&grace::gated_dkd::gated_dkd_backward_in_place_cuda));
}
