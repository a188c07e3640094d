// cka on CUDA: launches and registration. The kernels are in
//
//   rows.h               norms, means and the centered rows that everything else multiplies
//   gram.h, direction.h  tensor cores: images with fewer rows than both widths together
//   warpgroup*.h         the same by wgmma, sm_90a
//   feature.h            tensor cores: the others
//   float32.h            CUDA cores, for float32 inputs
//
// Nothing is added atomically, and the host knows no image's length: grids are for the worst case,
// and blocks that no image needs end at once.
#include "ops/cka/cka.h"
#include "ops/cka/float32.h"
#include "ops/cka/launches.h"
#include "ops/cka/tensor_cores.h"

namespace grace::cka {
namespace {

namespace float32 {

using namespace grace::cka::float32;

Centered centered_of(const Tensor& kept, int width) {
  return {data<float>(kept), width, static_cast<int>(kept.size(1)), 1.0f / row_scale(width)};
}

int tile_rows(const Images& images) { return images.piece_bound<grace::cka::float32::kTile>(); }

void forward(const Centered& s, const Centered& t, const Values& values, const Tensor& like) {
  const int device = device_of(like), rows = tile_rows(values.images);
  Tensor sums = empty_float(like, {rows, kTileColumns, 3});
  launch(hsic_kernel, {dim3(rows, kTileColumns), kThreads}, device, s, t, data<float>(sums),
         values.images);
  launch(grace::cka::float32::value_kernel, {dim3(values.images.count), kThreads}, device,
         data<float>(sums), values);
}

void backward(const Tensor& grad, const Tensor& student, const Kept& kept, const Tensor& saved,
              const Images& images, int teacher_width, const Tensor& out) {
  const int device = device_of(student), width = static_cast<int>(student.size(1));
  const int rows = tile_rows(images);
  const Centered s = centered_of(kept.student, width), t = centered_of(kept.teacher, teacher_width);
  const auto columns = static_cast<unsigned>(ceil_div(width, grace::cka::float32::kTile));
  Tensor direction = empty_float(student, {images.rows, width});
  Tensor difference = empty_float(student, {images.rows, kStrip});
  // Strips that no image reaches end at once.
  for (int strip = 0; strip < ceil_div(images.rows, kStrip); ++strip) {
    launch(difference_kernel, {dim3(rows, kStripTiles), kThreads}, device, s, t, data<float>(grad),
           data<float>(saved), data<float>(difference), strip, images);
    launch(grace::cka::float32::direction_kernel, {dim3(rows, columns), kThreads}, device, s,
           data<float>(saved), data<float>(difference), data<float>(direction), strip, images);
  }
  launch(normalization_backward_kernel, {dim3(ceil_div(images.rows, kWarps)), kThreads}, device,
         data<float>(student), data<float>(kept.stats), data<float>(saved), data<float>(direction),
         data<float>(out), width, images);
}

}  // namespace float32

// student [T, ds] and teacher [T, dt] of one dtype, cu_seqlens int32 [B + 1], contiguous: checked
// in Python.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cka_cuda(const Tensor& student,
                                                                    const Tensor& teacher,
                                                                    const Tensor& cu_seqlens,
                                                                    int64_t min_tokens) {
  const Images images = images_of(student, cu_seqlens);
  const int widths[] = {static_cast<int>(student.size(1)), static_cast<int>(teacher.size(1))};
  Tensor value = empty_float(student, {images.count});
  Tensor saved = empty_float(student, {images.count, kSavedColumns});
  const auto type =
      student.scalar_type() == ScalarType::Float ? ScalarType::Float : ScalarType::Half;
  const auto kept_rows = [&](int width) {
    return torch::stable::new_empty(student, {images.rows, kept_pitch(width)}, type);
  };
  const Kept kept = {empty_float(student, {2, images.rows}),
                     empty_float(student, {images.count, kept_pitch(widths[0])}),
                     kept_rows(widths[0]), kept_rows(widths[1])};
  const Values values = {data<float>(value), data<float>(saved), images,
                         static_cast<int>(min_tokens)};
  dispatch_floating(student.scalar_type(), "cka", [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      keep_rows<T, float>(student, teacher, images, kept);
      float32::forward(float32::centered_of(kept.student, widths[0]),
                       float32::centered_of(kept.teacher, widths[1]), values, student);
    } else {
      keep_rows<T, fp16>(student, teacher, images, kept);
      launch_values(gram_arguments(kept, widths[0], widths[1], images), values, student);
    }
  });
  return {value, saved, kept.stats, kept.means, kept.student, kept.teacher};
}

Tensor cka_backward_cuda(const Tensor& grad, const Tensor& student, const Tensor& cu_seqlens,
                         const Tensor& saved, const Tensor& stats, const Tensor& means,
                         const Tensor& student_rows, const Tensor& teacher_rows,
                         int64_t teacher_width) {
  const Images images = images_of(student, cu_seqlens);
  const Kept kept = {stats, means, student_rows, teacher_rows};
  const int width = static_cast<int>(teacher_width);
  Tensor grad_student = torch::stable::empty_like(student);
  dispatch_floating(student.scalar_type(), "cka_backward", [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      float32::backward(grad, student, kept, saved, images, width, grad_student);
    } else {
      backward_tensor_cores<T>(grad, student, kept, saved, images, width, grad_student);
    }
  });
  return grad_student;
}

}  // namespace
}  // namespace grace::cka

GRACE_CUDA_KERNELS(m) {
  m.impl("cka", TORCH_BOX(&grace::cka::cka_cuda));
  m.impl("cka_backward", TORCH_BOX(&grace::cka::cka_backward_cuda));
}
