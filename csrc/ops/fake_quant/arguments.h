// Reading fake_quant's arguments, for the CPU and the CUDA side.
#pragma once

#include "common/tensor.h"
#include "ops/fake_quant/fake_quant.h"

namespace grace::fake_quant {

inline ScaleGrid grid_of(std::optional<ScalarType> scale_dtype) {
  if (!scale_dtype || *scale_dtype == ScalarType::Float) return ScaleGrid::kFloat32;
  if (*scale_dtype == ScalarType::BFloat16) return ScaleGrid::kBFloat16;
  STD_TORCH_CHECK(*scale_dtype == ScalarType::Half,
                  "fake_quant: scale_dtype must be bfloat16, float16, float32 or None");
  return ScaleGrid::kFloat16;
}

}  // namespace grace::fake_quant
