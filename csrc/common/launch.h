// Launching kernels: on the device's current stream, on the device of the tensors, errors checked.
//
//   grace::launch(kernel<T>, {grid, block, shared_bytes}, device_of(x), arguments...);
//
// With GRACE_EMULATE the same call runs the kernel on the CPU, every CUDA thread a fiber.
#pragma once

#include <cstddef>

#include "common/device.h"

#if defined(GRACE_EMULATE)
#include "emulation/cuda.h"
#define GRACE_DYNAMIC_SHARED(name) unsigned char* name = grace::emulation::dynamic_shared()
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#define GRACE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// Sits behind USE_CUDA in torch's headers, and a CPU-only libtorch lacks it: weak, so that a build
// with CUDA kernels still imports there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace grace {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  // A dependent kernel may start before the one ahead of it in the stream has ended: until it calls
  // wait_for_previous_kernel it touches only what no kernel writes. Elsewhere than on sm_90 and
  // later, or with code for less, it is launched as any other.
  bool dependent = false;
  unsigned cluster = 1;  // blocks, along x, that share their shared memory
};

constexpr int kWarpSize = 32;

// What a dependent kernel calls before it reads or writes what other kernels write; from then on
// the next dependent kernel of the stream may start.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same for a kernel that does little behind the wait: the next dependent kernel may start
// before it. What that one may do by then, such as bringing weights near, overlaps with the kernel
// ahead.
__device__ __forceinline__ void start_next_kernel_and_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename Integer>
GRACE_HOST_DEVICE constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

#if defined(GRACE_EMULATE)

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, int /*device*/,
            Arguments... arguments) {
  emulation::run(shape.grid, shape.block, shape.shared_bytes,
                 [&] { kernel(static_cast<Parameters>(arguments)...); });
}

inline int device_of(const Tensor&) { return 0; }

#else

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "grace: this torch has no CUDA support");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, int device,
            Arguments... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (shape.shared_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shape.shared_bytes)),
               "setting a kernel's shared memory");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = current_stream(device);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.dependent && Device::of(device).capability >= 90) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
             "launching a kernel");
}

inline int device_of(const Tensor& tensor) { return tensor.get_device_index(); }

#endif

}  // namespace grace
