// Arithmetic of gated_dkd (see grace/ops/gated_dkd.py for the formulas).
//
// Everything is powers of two: e^((z − m)/T) = 2^(z·c − m·c), c = log2(e)/T, is one multiply-add
// and one instruction of the special function unit, and at T = 2 its square is e^(z − m). What m·c
// loses to rounding is the same for every class and known exactly, so it is given back once a row.
// Sums over a row's classes are taken in one pass relative to a logit m met so far, that one larger
// by more than kSlack replaces. The target class stays out of the sums and joins at the end.
#pragma once

#include <cmath>

#include "common/numeric.h"

namespace grace::gated_dkd {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kSlack = 1.0f;
constexpr float kNone = -1e30f;  // m of empty sums: finite, so that no difference is NaN

struct Settings {
  float temperature;
  float inverse_temperature;
  float log2_scale;  // c
  float alpha;
  float beta;
};

// Columns of `saved`: what the backward needs of a row beside the logits themselves.
enum Saved { kLogRestStudent, kLogRestTeacher, kLogSumStudent, kProbabilityGap, kSavedColumns };

// 2^x, 0 below 2^-126.
GRACE_HOST_DEVICE float power(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// m·scale, rounded: not to be fused with what it is subtracted from, which would round otherwise.
GRACE_HOST_DEVICE float offset_of(float m, float scale) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(m, scale);
#else
  return m * scale;
#endif
}

// log2 of what the rounding of m·scale makes sums relative to m too large by.
GRACE_HOST_DEVICE float excess(float m, float scale) {
  return fmaf(m, scale, -offset_of(m, scale));
}

// Of the student's logits z.
struct StudentSums {
  float m;
  float tempered;  // sum of e^((z − m)/T), but for the excess, as all of these
  float plain;     // sum of e^(z − m)

  static GRACE_HOST_DEVICE StudentSums none() { return {kNone, 0.0f, 0.0f}; }

  GRACE_HOST_DEVICE void raise(float to, const Settings& s) {
    if (!(to > m)) return;
    tempered *= power(offset_of(m, s.log2_scale) - offset_of(to, s.log2_scale));
    plain *= power(offset_of(m, kLog2E) - offset_of(to, kLog2E));
    m = to;
  }

  // kSquare: T = 2.
  template <bool kSquare>
  GRACE_HOST_DEVICE void add(float z, const Settings& s) {
    const float e = power(fmaf(z, s.log2_scale, -offset_of(m, s.log2_scale)));
    tempered += e;
    plain = kSquare ? fmaf(e, e, plain) : plain + power(fmaf(z, kLog2E, -offset_of(m, kLog2E)));
  }

  GRACE_HOST_DEVICE void merge(StudentSums other, const Settings& s) {
    raise(other.m, s);
    other.raise(m, s);
    tempered += other.tempered;
    plain += other.plain;
  }

  // Logarithms of the sums.
  GRACE_HOST_DEVICE float log_tempered(const Settings& s) const {
    return logf(tempered) - kLn2 * excess(m, s.log2_scale);
  }
  GRACE_HOST_DEVICE float log_plain() const { return logf(plain) - kLn2 * excess(m, kLog2E); }
};

// Of the teacher's logits w, and of the student's z beside them.
struct TeacherSums {
  float m;
  float tempered;  // sum of e^((w − m)/T)
  float plain;     // sum of e^(w − m)
  float depth;     // sum of e^(w − m) (w − m)·c: but for the slack all of one sign
  float cross;     // sum of e^((w − m)/T) (w − z)

  static GRACE_HOST_DEVICE TeacherSums none() { return {kNone, 0.0f, 0.0f, 0.0f, 0.0f}; }

  GRACE_HOST_DEVICE void raise(float to, const Settings& s) {
    if (!(to > m)) return;
    const float step = offset_of(m, s.log2_scale) - offset_of(to, s.log2_scale);
    const float tempered_factor = power(step),
                plain_factor = power(offset_of(m, kLog2E) - offset_of(to, kLog2E));
    tempered *= tempered_factor;
    cross *= tempered_factor;
    depth = plain_factor * fmaf(step, plain, depth);
    plain *= plain_factor;
    m = to;
  }

  template <bool kSquare>
  GRACE_HOST_DEVICE void add(float w, float z, const Settings& s) {
    const float x = fmaf(w, s.log2_scale, -offset_of(m, s.log2_scale));
    const float e = power(x);
    const float p = kSquare ? e * e : power(fmaf(w, kLog2E, -offset_of(m, kLog2E)));
    tempered += e;
    plain += p;
    depth = fmaf(p, x, depth);
    cross = fmaf(e, w - z, cross);
  }

  // The same where w, or z beside a w that counts for nothing, may be −infinity: 0 log 0 = 0.
  GRACE_HOST_DEVICE void add_carefully(float w, float z, const Settings& s) {
    if (w == -kInfinity) return;
    const float counts = power(fmaf(w, s.log2_scale, -offset_of(m, s.log2_scale)));
    add<false>(w, counts == 0.0f ? w : z, s);
  }

  GRACE_HOST_DEVICE float log_tempered(const Settings& s) const {
    return logf(tempered) - kLn2 * excess(m, s.log2_scale);
  }

  GRACE_HOST_DEVICE float entropy(const Settings& s) const {
    const float mean = s.temperature * (depth / plain - excess(m, s.log2_scale));
    return logf(plain) - kLn2 * (excess(m, kLog2E) + mean);
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
                              int shared, const Settings& s) {
  const float log_student = student.log_tempered(s), log_teacher = teacher.log_tempered(s);
  const float u_student = fmaf(z - student.m, s.inverse_temperature, -log_student);
  const float u_teacher = fmaf(w - teacher.m, s.inverse_temperature, -log_teacher);
  const float tckd = sigmoid(u_teacher) * (log_sigmoid(u_teacher) - log_sigmoid(u_student)) +
                     sigmoid(-u_teacher) * (log_sigmoid(-u_teacher) - log_sigmoid(-u_student));
  const float distance = teacher.cross / teacher.tempered - (teacher.m - student.m);
  const float nckd = fmaf(distance, s.inverse_temperature, log_student - log_teacher);
  // Where both probabilities are near 1 their difference is that of the complements, uncancelled.
  const float gap = u_student > 0.0f && u_teacher > 0.0f ? sigmoid(-u_teacher) - sigmoid(-u_student)
                                                         : sigmoid(u_student) - sigmoid(u_teacher);
  const float rest_student = fmaf(student.m, s.inverse_temperature, log_student);
  const float rest_teacher = fmaf(teacher.m, s.inverse_temperature, log_teacher);
  teacher.raise(w, s);
  teacher.add_carefully(w, w, s);
  const float scale = s.temperature * s.temperature;
  return {scale * (s.alpha * tckd + s.beta * nckd),
          expf(-teacher.entropy(s) / logf(static_cast<float>(shared))),
          0.0f,
          {rest_student, rest_teacher, 0.0f, gap}};
}

// What the gradient at any class of a row needs.
struct RowGradient {
  float student, teacher;  // log-sum-exp of z/T and of w/T beside the target
  float beta;              // factor of q_s − q_t
  float gap;               // factor of e_t − q_s
  float log_sum;           // log-sum-exp of z
  float cross_entropy;     // factor of softmax(z) − e_t
  float square;            // at T = 2, of the square of q_s: that times e^(2·rest − log_sum)
};

GRACE_HOST_DEVICE RowGradient row_gradient(const float* saved, float grad_loss, float grad_ce,
                                           const Settings& s) {
  const float rest = saved[kLogRestStudent], log_sum = saved[kLogSumStudent];
  return {rest,
          saved[kLogRestTeacher],
          s.temperature * grad_loss * s.beta,
          s.temperature * grad_loss * s.alpha * saved[kProbabilityGap],
          log_sum,
          grad_ce,
          grad_ce * expf(2.0f * rest - log_sum)};
}

// At a class beside the target of which the teacher says nothing.
GRACE_HOST_DEVICE float cross_entropy_gradient(float z, const RowGradient& row) {
  return row.cross_entropy * power((z - row.log_sum) * kLog2E);
}

// At a class beside the target.
template <bool kSquare, bool kCrossEntropy>
GRACE_HOST_DEVICE float gradient_of(float z, float w, const RowGradient& row, const Settings& s) {
  const float q_student = power(fmaf(z, s.inverse_temperature, -row.student) * kLog2E);
  const float q_teacher = power(fmaf(w, s.inverse_temperature, -row.teacher) * kLog2E);
  float grad = row.beta * (q_student - q_teacher) - row.gap * q_student;
  if constexpr (kCrossEntropy && kSquare) grad += row.square * (q_student * q_student);
  if constexpr (kCrossEntropy && !kSquare) grad += cross_entropy_gradient(z, row);
  return grad;
}

GRACE_HOST_DEVICE float target_gradient(float z, const RowGradient& row) {
  return row.gap + row.cross_entropy * expm1f(z - row.log_sum);
}

}  // namespace grace::gated_dkd
