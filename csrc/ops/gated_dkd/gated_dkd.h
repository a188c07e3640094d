// Arithmetic of gated_dkd, the same on every device (see grace/ops/gated_dkd.py for the formulas).
//
// Every sum over a row's classes is taken in one pass, relative to the largest logit met so far,
// and rescaled when a larger one comes. The target class stays out of the sums and joins at the
// end.
#pragma once

#include <cmath>

#include "common/numeric.h"

namespace grace::gated_dkd {

constexpr float kInfinity = __builtin_inff();

struct Settings {
  float temperature;
  float inverse_temperature;
  float alpha;
  float beta;
};

// Columns of `saved`: what the backward needs of a row beside the logits themselves.
enum Saved { kLogRestStudent, kLogRestTeacher, kLogSumStudent, kProbabilityGap, kSavedColumns };

// Of the student's logits z, with m the largest of them.
struct StudentSums {
  float max;
  float tempered;  // sum of exp((z - m) / T)
  float plain;     // sum of exp(z - m)

  static GRACE_HOST_DEVICE StudentSums none() { return {-kInfinity, 0.0f, 0.0f}; }

  GRACE_HOST_DEVICE void raise(float to, const Settings& s) {
    if (!(to > max)) return;
    tempered *= expf((max - to) * s.inverse_temperature);
    plain *= expf(max - to);
    max = to;
  }

  // A class left out is -infinity, which minus itself is not a number.
  GRACE_HOST_DEVICE void add(float z, const Settings& s) {
    if (z == -kInfinity) return;
    tempered += expf((z - max) * s.inverse_temperature);
    plain += expf(z - max);
  }

  GRACE_HOST_DEVICE void merge(StudentSums other, const Settings& s) {
    raise(other.max, s);
    other.raise(max, s);
    tempered += other.tempered;
    plain += other.plain;
  }
};

// Of the teacher's logits w, with m the largest of them, and of the student's z beside them.
struct TeacherSums {
  float max;
  float tempered;  // sum of exp((w - m) / T)
  float plain;     // sum of exp(w - m)
  float depth;     // sum of exp(w - m) (w - m): all of one sign, nothing cancels
  float cross;     // sum of exp((w - m) / T) (w - z) / T

  static GRACE_HOST_DEVICE TeacherSums none() { return {-kInfinity, 0.0f, 0.0f, 0.0f, 0.0f}; }

  GRACE_HOST_DEVICE void raise(float to, const Settings& s) {
    if (!(to > max)) return;
    const float tempered_factor = expf((max - to) * s.inverse_temperature);
    const float factor = expf(max - to);
    tempered *= tempered_factor;
    cross *= tempered_factor;
    if (plain > 0.0f) depth = factor * (depth + (max - to) * plain);
    plain *= factor;
    max = to;
  }

  GRACE_HOST_DEVICE void add(float w, float z, const Settings& s) {
    if (w == -kInfinity) return;
    const float e = expf((w - max) * s.inverse_temperature);
    const float p = expf(w - max);
    tempered += e;
    plain += p;
    depth += p * (w - max);
    if (e != 0.0f) cross += e * ((w - z) * s.inverse_temperature);  // 0 log 0 = 0
  }

  GRACE_HOST_DEVICE void merge(TeacherSums other, const Settings& s) {
    raise(other.max, s);
    other.raise(max, s);
    tempered += other.tempered;
    plain += other.plain;
    depth += other.depth;
    cross += other.cross;
  }
};

struct Row {
  float loss;
  float gate;
  float cross_entropy;
  float saved[kSavedColumns];
};

GRACE_HOST_DEVICE float sigmoid(float u) { return 1.0f / (1.0f + expf(-u)); }

GRACE_HOST_DEVICE float log_sigmoid(float u) { return fminf(u, 0.0f) - log1pf(expf(-fabsf(u))); }

// From the sums over a row's shared non-target classes, its target logits z and w, and the number
// of shared classes: all of the row but its cross-entropy, to which more classes may belong.
GRACE_HOST_DEVICE Row distill(const StudentSums& student, TeacherSums teacher, float z, float w,
                              int64_t shared, const Settings& s) {
  const float rest_student = fmaf(student.max, s.inverse_temperature, logf(student.tempered));
  const float rest_teacher = fmaf(teacher.max, s.inverse_temperature, logf(teacher.tempered));
  const float u_student = fmaf(z, s.inverse_temperature, -rest_student);
  const float u_teacher = fmaf(w, s.inverse_temperature, -rest_teacher);
  const float tckd = sigmoid(u_teacher) * (log_sigmoid(u_teacher) - log_sigmoid(u_student)) +
                     sigmoid(-u_teacher) * (log_sigmoid(-u_teacher) - log_sigmoid(-u_student));
  const float nckd = teacher.cross / teacher.tempered - rest_teacher + rest_student;
  // Where both probabilities are near 1 their difference is that of the complements, uncancelled.
  const float gap = u_student > 0.0f && u_teacher > 0.0f ? sigmoid(-u_teacher) - sigmoid(-u_student)
                                                         : sigmoid(u_student) - sigmoid(u_teacher);
  teacher.raise(w, s);
  teacher.add(w, w, s);
  const float entropy = logf(teacher.plain) - teacher.depth / teacher.plain;
  const float scale = s.temperature * s.temperature;
  return {scale * (s.alpha * tckd + s.beta * nckd),
          expf(-entropy / logf(static_cast<float>(shared))),
          0.0f,
          {rest_student, rest_teacher, 0.0f, gap}};
}

GRACE_HOST_DEVICE float log_sum(const StudentSums& sums) { return sums.max + logf(sums.plain); }

// What the gradient at any class of a row needs.
struct RowGradient {
  float rest_student, rest_teacher, log_sum;
  float beta;           // factor of q_s - q_t
  float gap;            // factor of e_t - q_s
  float cross_entropy;  // factor of the softmax at temperature 1, and minus that at the target
};

GRACE_HOST_DEVICE RowGradient row_gradient(const float* saved, float grad_loss, float grad_ce,
                                           const Settings& s) {
  const float scale = s.temperature * grad_loss;
  return {saved[kLogRestStudent],
          saved[kLogRestTeacher],
          saved[kLogSumStudent],
          scale * s.beta,
          scale * s.alpha * saved[kProbabilityGap],
          grad_ce};
}

GRACE_HOST_DEVICE float distillation_gradient(float z, float w, bool is_target,
                                              const RowGradient& row, const Settings& s) {
  if (is_target) return row.gap;
  const float q_student = expf(fmaf(z, s.inverse_temperature, -row.rest_student));
  const float q_teacher = expf(fmaf(w, s.inverse_temperature, -row.rest_teacher));
  return row.beta * (q_student - q_teacher) - row.gap * q_student;
}

GRACE_HOST_DEVICE float cross_entropy_gradient(float z, bool is_target, const RowGradient& row) {
  return row.cross_entropy * (expf(z - row.log_sum) - (is_target ? 1.0f : 0.0f));
}

}  // namespace grace::gated_dkd
