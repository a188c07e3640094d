// Bulk copies from global to shared memory, whose bytes a barrier (cluster.h) counts: sm_90.
#pragma once

#include "common/cluster.h"
#include "common/launch.h"

#if !defined(GRACE_EMULATE)
#include <cuda.h>

namespace grace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// `bytes`, a multiple of 16 as both addresses are.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The map's box at (column, row); zeros outside of the matrix.
__device__ __forceinline__ void bulk_copy_box(void* to, const CUtensorMap& map, int column, int row,
                                              uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

#endif

// A row-major matrix of 16-bit elements, rows a multiple of 16 bytes apart, for boxes of 64 columns
// and `box_rows` (at most 256) in shared memory with the swizzle of 128 bytes.
inline CUtensorMap matrix_map(const void* data, bool is_bf16, int64_t rows, int64_t columns,
                              int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found),
               "looking for cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("grace: this driver lacks cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status =
      encode(&map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::ostringstream message;
    message << "grace: describing a matrix [" << rows << ", " << columns
            << "] to the copy engine failed with CUDA error " << static_cast<int>(status);
    throw std::runtime_error(message.str());
  }
  return map;
}

}  // namespace grace

#endif
