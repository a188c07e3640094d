// Copies from global to shared memory by the copy engine (TMA), whose bytes a barrier (cluster.h)
// counts: sm_90 and later.
//
// What a whole warp calls together is done by one of its threads: so addresses stay uniform.
#pragma once

#include "common/cluster.h"
#include "common/launch.h"

#if !defined(GRACE_EMULATE)
#include <cuda.h>

namespace grace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Arrives, and expects so many more bytes in this phase; by a whole warp.
__device__ __forceinline__ void warp_expect_bytes(uint32_t barrier, int bytes) {
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n}" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}

// The map's box at (column, row) to shared memory, zeros outside of the matrix; by a whole warp.
__device__ __forceinline__ void warp_copy_box(uint32_t to, const CUtensorMap& map, int column,
                                              int row, uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];\n}" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same to all blocks of the cluster that `blocks` has a bit for: there too `to` and `barrier`.
__device__ __forceinline__ void warp_copy_box_to(uint16_t blocks, uint32_t to,
                                                 const CUtensorMap& map, int column, int row,
                                                 uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;\n}" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// The same of four dimensions, from the beginning of the first two.
__device__ __forceinline__ void warp_copy_box_4d(uint32_t to, const CUtensorMap& map, int third,
                                                 int fourth, uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %2, %3, %4}], [%5];\n}" ::"r"(to),
      "l"(&map), "r"(0), "r"(third), "r"(fourth), "r"(barrier)
      : "memory");
}

// So many bytes, a multiple of 16 between addresses that are ones too, to all blocks of the cluster
// that `blocks` has a bit for; by a whole warp.
__device__ __forceinline__ void warp_copy_bytes_to(uint16_t blocks, uint32_t to, const void* from,
                                                   int bytes, uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1], %2, [%3], %4;\n}" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(blocks)
      : "memory");
}

// Starts to fetch the map itself.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

#endif

// What a tensor map describes: sizes and box from the innermost dimension on, strides in bytes from
// the second one on.
template <int kDimensions>
struct Boxes {
  CUtensorMapDataType type;
  const void* data;
  cuuint64_t sizes[kDimensions];
  cuuint64_t strides[kDimensions - 1];
  cuuint32_t box[kDimensions];
  CUtensorMapSwizzle swizzle;
};

// Raises: std::runtime_error where the driver refuses.
template <int kDimensions>
CUtensorMap tensor_map(const Boxes<kDimensions>& boxes) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // A thread that has used no CUDA yet, as autograd's, has no context, which the driver asks for.
  int device = 0;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaSetDevice(device), "setting the device");
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
  cuuint32_t steps[kDimensions];
  for (cuuint32_t& step : steps) step = 1;
  CUtensorMap map;
  const CUresult status =
      encode(&map, boxes.type, kDimensions, const_cast<void*>(boxes.data), boxes.sizes,
             boxes.strides, boxes.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, boxes.swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::ostringstream message;
    message << "grace: describing a tensor of " << boxes.sizes[0];
    for (int i = 1; i < kDimensions; ++i) message << " x " << boxes.sizes[i];
    message << " elements to the copy engine failed with CUDA error " << static_cast<int>(status);
    throw std::runtime_error(message.str());
  }
  return map;
}

}  // namespace grace

#endif
