// gated_dkd on CUDA. Forward: a block a row, both logits read once. Backward: a block a part of a
// row, both logits read once and the gradient written once.
#include "ops/gated_dkd/gated_dkd.h"

#include <type_traits>

#include "ops/gated_dkd/rows.h"

namespace grace::gated_dkd {
namespace {

constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 4;          // 64 registers a thread
constexpr int kPartClasses = 32768;      // of a row, that a block of the backward does
constexpr float kLeftOut = -2e30f;       // as a logit, of the target: adds 0 to every sum
constexpr float kMinTemperature = 0.1f;  // of the one-pass sums: below, 2^(kSlack/T)² is large

// A row's logits.
template <typename T>
struct Line {
  const T* student;  // [classes]
  const T* teacher;  // [at least shared]
  int classes;
  int shared;  // classes that both have
  int target;
};

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

// use.template operator()<N>(first, z, w) for all classes that both have; `third` is of the rows
// that may not be wide where they lie differently.
template <typename T, typename Use>
__device__ __forceinline__ void for_shared(const Line<T>& line, const T* third, const Use& use) {
  const auto load_both = [&]<int N>(int first) {
    return Pair<T, N>{load<N>(line.student + first), load<N>(line.teacher + first)};
  };
  const auto use_both = [&]<int N>(int first, const Pair<T, N>& pair) {
    float z[N], w[N];
    unpack(pair.student, z);
    unpack(pair.teacher, w);
    use.template operator()<N>(first, z, w);
  };
  const int offset = misalignment(line.student);
  const bool even = offset == misalignment(line.teacher) && offset == misalignment(third);
  for_each<T>(line.shared, even ? offset : kUneven, load_both, use_both);
}

// use(z) for all classes that the student alone has.
template <typename T, typename Use>
__device__ __forceinline__ void for_padding(const Line<T>& line, const Use& use) {
  for (int i = line.shared + static_cast<int>(threadIdx.x); i < line.classes; i += kThreads)
    use(to_float(line.student[i]));
}

// --- sums of a block -----------------------------------------------------------------------------

__device__ __forceinline__ StudentSums exchange(const StudentSums& sums, int lanes) {
  return {__shfl_xor_sync(kFullWarp, sums.m, lanes),
          __shfl_xor_sync(kFullWarp, sums.tempered, lanes),
          __shfl_xor_sync(kFullWarp, sums.plain, lanes)};
}

__device__ __forceinline__ TeacherSums exchange(const TeacherSums& sums, int lanes) {
  return {
      __shfl_xor_sync(kFullWarp, sums.m, lanes), __shfl_xor_sync(kFullWarp, sums.tempered, lanes),
      __shfl_xor_sync(kFullWarp, sums.plain, lanes), __shfl_xor_sync(kFullWarp, sums.depth, lanes),
      __shfl_xor_sync(kFullWarp, sums.cross, lanes)};
}

// Sums of the block in every thread. Both partners of an exchange add the same two numbers, and
// warps are added in order, so the result is bitwise repeatable.
template <typename Sums>
__device__ __forceinline__ void block_merge(Sums& sums, Sums* scratch, const Settings& s) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) sums.merge(exchange(sums, lanes), s);
  __syncthreads();  // the scratch may still be read from an earlier call
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = sums;
  __syncthreads();
  sums = scratch[0];
#pragma unroll 1
  for (int warp = 1; warp < kWarps; ++warp) sums.merge(scratch[warp], s);
}

struct Scratch {
  StudentSums student[kWarps];
  TeacherSums teacher[kWarps];
};

// Over a row's classes: of the shared ones beside the target, and of the student's padding. Logits
// are less the shifts.
struct RowSums {
  StudentSums student = StudentSums::none();
  TeacherSums teacher = TeacherSums::none();
  StudentSums padding = StudentSums::none();
  float student_shift = 0.0f;
  float teacher_shift = 0.0f;

  template <typename T>
  __device__ __forceinline__ void add_padding(const Line<T>& line, const Settings& s) {
    for_padding(line, [&](float z) {
      z -= student_shift;
      padding.raise(z, s);
      padding.add<false>(z, s);
    });
  }

  __device__ __forceinline__ void merge_block(bool with_padding, Scratch& scratch,
                                              const Settings& s) {
    block_merge(student, scratch.student, s);
    block_merge(teacher, scratch.teacher, s);
    if (with_padding) block_merge(padding, scratch.student, s);
  }
};

template <int N>
__device__ __forceinline__ float max_of(const float (&x)[N]) {
  float max = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) max = fmaxf(max, x[i]);
  return max;
}

// One pass. Nothing is tested an element, so a row that is not all finite, or out of proportion,
// gives a result that is not finite.
template <bool kSquare, typename T>
__device__ __forceinline__ RowSums sums_of(const Line<T>& line, Scratch& scratch,
                                           const Settings& s) {
  RowSums sums;
  StudentSums student = sums.student;
  TeacherSums teacher = sums.teacher;
  for_shared(line, line.student, [&]<int N>(int first, float (&z)[N], float (&w)[N]) {
    if (static_cast<unsigned>(line.target - first) < N) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (first + i == line.target) z[i] = w[i] = kLeftOut;
    }
    const float student_max = max_of(z), teacher_max = max_of(w);
    if (student_max > student.m + kSlack) student.raise(student_max, s);
    if (teacher_max > teacher.m + kSlack) teacher.raise(teacher_max, s);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      student.add<kSquare>(z[i], s);
      teacher.add<kSquare>(w[i], z[i], s);
    }
  });
  sums.student = student;
  sums.teacher = teacher;
  sums.add_padding(line, s);
  sums.merge_block(line.classes > line.shared, scratch, s);
  return sums;
}

__device__ __forceinline__ float block_max(float max, float* scratch) {
  max = warp_max(max);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = max;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) max = fmaxf(max, scratch[warp]);
  return max;
}

// Two passes for rows that one pass cannot do: the largest logits first, then sums of what is less
// than those, class by class, in which −infinity has its place.
template <typename T>
__device__ __noinline__ RowSums careful_sums_of(const Line<T>& line, Scratch& scratch,
                                                const Settings& s) {
  __shared__ float maxima[kWarps];
  float student_max = -kInfinity, teacher_max = -kInfinity;
  for (int i = threadIdx.x; i < line.shared; i += kThreads) {
    if (i == line.target) continue;
    student_max = fmaxf(student_max, to_float(line.student[i]));
    teacher_max = fmaxf(teacher_max, to_float(line.teacher[i]));
  }
  RowSums sums;
  sums.student_shift = block_max(student_max, maxima);
  sums.teacher_shift = block_max(teacher_max, maxima);
  sums.student.m = sums.teacher.m = 0.0f;
  for (int i = threadIdx.x; i < line.shared; i += kThreads) {
    if (i == line.target) continue;
    const float z = to_float(line.student[i]), w = to_float(line.teacher[i]);
    const float below = z - sums.student_shift;
    sums.student.add<false>(below, s);
    if (w != -kInfinity) sums.teacher.add_carefully(w - sums.teacher_shift, below, s);
  }
  sums.add_padding(line, s);
  sums.merge_block(line.classes > line.shared, scratch, s);
  return sums;
}

template <typename T>
__device__ __forceinline__ Row row_of(RowSums sums, const Line<T>& line, bool distilled,
                                      const Settings& s) {
  const float z = to_float(line.student[line.target]) - sums.student_shift;
  Row row = {};
  if (distilled) {
    const float w = to_float(line.teacher[line.target]) - sums.teacher_shift;
    row = distill(sums.student, sums.teacher, z, w, line.shared, s);
    row.saved[kLogRestStudent] += sums.student_shift * s.inverse_temperature;
    row.saved[kLogRestTeacher] += sums.teacher_shift * s.inverse_temperature;
    sums.student.raise(z, s);
    sums.student.add<false>(z, s);
  }
  sums.student.merge(sums.padding, s);
  const float log_plain = sums.student.log_plain();
  row.cross_entropy = sums.student.m - z + log_plain;
  row.saved[kLogSumStudent] = sums.student.m + log_plain + sums.student_shift;
  return row;
}

__device__ __forceinline__ bool all_finite(const Row& row) {
  const float sum = fabsf(row.loss) + fabsf(row.gate) + fabsf(row.cross_entropy);
  return sum < kInfinity;
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
