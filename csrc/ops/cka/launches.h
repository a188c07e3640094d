// What all launches of cka ask of tensors and of the device, and the launches of rows.h.
#pragma once

#include "common/launch.h"
#include "ops/cka/rows.h"

namespace grace::cka {
namespace {

Tensor empty_float(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

Images images_of(const Tensor& x, const Tensor& cu_seqlens) {
  return {data<int>(cu_seqlens), static_cast<int>(cu_seqlens.size(0) - 1),
          static_cast<int>(x.size(0))};
}

bool wide_rows(const Tensor& x) {
  return x.size(1) % kWide == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
}

int most_shared_bytes(int device) { return Device::of(device).shared_bytes; }
int multiprocessors(int device) { return Device::of(device).processors; }

LaunchShape following(dim3 grid, int threads, size_t shared_bytes = 0) {
  LaunchShape shape{grid, dim3(threads), shared_bytes};
  shape.dependent = true;
  return shape;
}

// What forward makes beside its results: the rows, for the products and for backward.
struct Kept {
  Tensor stats;    // [2, T]: the student's 1 / norm and ⟨mean, centered row⟩
  Tensor means;    // [B, pitch] of the student's unit rows, float32
  Tensor student;  // [T, pitch]
  Tensor teacher;
};

template <typename T, typename K>
void keep_rows(const Tensor& student, const Tensor& teacher, const Images& images,
               const Kept& kept) {
  const int64_t pieces = images.piece_bound<kPiece>();
  const int64_t pitch[] = {kept.student.size(1), kept.teacher.size(1)};
  Tensor inverse = empty_float(student, {images.rows});
  Tensor sums = empty_float(student, {pieces * (pitch[0] + pitch[1])});
  Tensor teacher_means = empty_float(student, {images.count * pitch[1]});
  const auto rows_of = [&](int model) {
    const Tensor& x = model == 0 ? student : teacher;
    return Rows<T, K>{
        data<T>(x),
        data<K>(model == 0 ? kept.student : kept.teacher),
        data<float>(model == 0 ? kept.stats : inverse),
        model == 0 ? data<float>(kept.stats) + images.rows : nullptr,
        data<float>(sums) + model * pieces * pitch[0],
        data<float>(model == 0 ? kept.means : teacher_means),
        static_cast<int>(x.size(1)),
        static_cast<int>(pitch[model]),
    };
  };
  launch_rows<T, K>({rows_of(0), rows_of(1)}, images, wide_rows(student) && wide_rows(teacher),
                    most_shared_bytes(device_of(student)), device_of(student));
}

}  // namespace
}  // namespace grace::cka
