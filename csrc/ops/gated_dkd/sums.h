// The sums over a row's classes, by a block: in one pass, or carefully in two.
#pragma once

#include "ops/gated_dkd/gated_dkd.h"
#include "ops/gated_dkd/rows.h"

namespace grace::gated_dkd {

constexpr int kWarps = kThreads / kWarpSize;
constexpr float kLeftOut = -2e30f;       // as a logit, of the target: adds 0 to every sum
constexpr float kMinTemperature = 0.1f;  // of the one-pass sums: below, 2^(kSlack/T)² is large

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

}  // namespace grace::gated_dkd
