// The sums over a row's classes, by a block: in one pass, or carefully in two.
#pragma once

#include "ops/gated_dkd/gated_dkd.h"
#include "ops/gated_dkd/rows.h"

namespace grace::gated_dkd {

constexpr int kWarps = kThreads / kWarpSize;
constexpr float kLeftOut = -2e30f;       // as a logit, of the target: adds 0 to every sum
constexpr float kMinTemperature = 0.1f;  // of the one-pass sums: below, 2^(kSlack/T)² is large

struct Scratch {
  float of_warp[kWarps][6];
};

// Combines N numbers over the block, in every thread. Both partners of an exchange combine the same
// two, and warps follow one another, so the result is bitwise repeatable.
template <int N, typename Combine>
__device__ __forceinline__ void block_reduce(float (&x)[N], Scratch& scratch,
                                             const Combine& combine) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = combine(x[i], __shfl_xor_sync(kFullWarp, x[i], lanes));
  __syncthreads();  // the scratch may still be read from an earlier call
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (threadIdx.x % kWarpSize == 0) scratch.of_warp[threadIdx.x / kWarpSize][i] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = scratch.of_warp[0][i];
    for (int warp = 1; warp < kWarps; ++warp) x[i] = combine(x[i], scratch.of_warp[warp][i]);
  }
}

template <int N>
__device__ __forceinline__ void block_max(float (&x)[N], Scratch& scratch) {
  block_reduce(x, scratch, [](float a, float b) { return fmaxf(a, b); });
}

template <int N>
__device__ __forceinline__ void block_sum(float (&x)[N], Scratch& scratch) {
  block_reduce(x, scratch, [](float a, float b) { return a + b; });
}

// Over a row's classes: of the shared ones beside the target, and of the student's padding. Logits
// are less the shifts.
struct RowSums {
  StudentSums student = StudentSums::none();
  TeacherSums teacher = TeacherSums::none();
  StudentSums padding = StudentSums::none();
  float student_shift = 0.0f;
  float teacher_shift = 0.0f;

  template <typename T>
  __device__ __forceinline__ void add_padding(const Line<T>& line, Scratch& scratch,
                                              const Settings& s) {
    for_padding(line, [&](float z) {
      z -= student_shift;
      padding.raise(z, s);
      padding.add<false>(z, s);
    });
    merge_padding(scratch, s);
  }

  // All threads rescale to the largest m, so that the rest is adding up.
  __device__ __forceinline__ void merge_block(Scratch& scratch, const Settings& s) {
    float m[] = {student.m, teacher.m};
    block_max(m, scratch);
    student.raise(m[0], s);
    teacher.raise(m[1], s);
    float sums[] = {student.tempered, student.plain, teacher.tempered,
                    teacher.plain,    teacher.depth, teacher.cross};
    block_sum(sums, scratch);
    student = {m[0], sums[0], sums[1]};
    teacher = {m[1], sums[2], sums[3], sums[4], sums[5]};
  }

  __device__ __forceinline__ void merge_padding(Scratch& scratch, const Settings& s) {
    float m[] = {padding.m};
    block_max(m, scratch);
    padding.raise(m[0], s);
    float sums[] = {padding.tempered, padding.plain};
    block_sum(sums, scratch);
    padding = {m[0], sums[0], sums[1]};
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
  sums.merge_block(scratch, s);
  if (line.classes > line.shared) sums.add_padding(line, scratch, s);
  return sums;
}

// Two passes for rows that one pass cannot do: the largest logits first, then sums of what is less
// than those, class by class, in which −infinity has its place.
template <typename T>
__device__ __noinline__ RowSums careful_sums_of(const Line<T>& line, Scratch& scratch,
                                                const Settings& s) {
  float largest[] = {-kInfinity, -kInfinity};
  for (int i = threadIdx.x; i < line.shared; i += kThreads) {
    if (i == line.target) continue;
    largest[0] = fmaxf(largest[0], to_float(line.student[i]));
    largest[1] = fmaxf(largest[1], to_float(line.teacher[i]));
  }
  RowSums sums;
  block_max(largest, scratch);
  sums.student_shift = largest[0];
  sums.teacher_shift = largest[1];
  sums.student.m = sums.teacher.m = 0.0f;
  for (int i = threadIdx.x; i < line.shared; i += kThreads) {
    if (i == line.target) continue;
    const float z = to_float(line.student[i]), w = to_float(line.teacher[i]);
    const float below = z - sums.student_shift;
    sums.student.add<false>(below, s);
    if (w != -kInfinity) sums.teacher.add_carefully(w - sums.teacher_shift, below, s);
  }
  sums.merge_block(scratch, s);
  if (line.classes > line.shared) sums.add_padding(line, scratch, s);
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
