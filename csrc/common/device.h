// The GPU that a kernel is launched on, and what its code was compiled for.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/tensor.h"

#if !defined(GRACE_EMULATE)
#include <cuda_runtime.h>

#include <mutex>
#endif

namespace grace {

struct Device {
  // Major and minor of the GPU, or of the code that runs there, whichever is less: a build for
  // sm_80 runs on later GPUs, without what they can do more.
  int capability;
  int processors, shared_bytes;
  std::string name;

  static const Device& of(int device);
};

#if defined(GRACE_EMULATE)

inline const Device& Device::of(int) {
  static const Device emulated{80, 4, 227 * 1024, "emulated"};
  return emulated;
}

#else

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::ostringstream message;
  message << "grace: " << what << " failed: " << cudaGetErrorString(status);
  throw std::runtime_error(message.str());
}

// Compiled like all kernels: its attributes are theirs.
static __global__ void compiled_as_others() {}

// Of the device that is current.
inline Device read_device(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "reading a device's properties");
  const auto get = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "reading a device attribute");
    return value;
  };
  cudaFuncAttributes code;
  check_cuda(cudaFuncGetAttributes(&code, compiled_as_others), "reading a kernel's attributes");
  const int gpu =
      get(cudaDevAttrComputeCapabilityMajor) * 10 + get(cudaDevAttrComputeCapabilityMinor);
  return {code.ptxVersion < gpu ? code.ptxVersion : gpu, get(cudaDevAttrMultiProcessorCount),
          get(cudaDevAttrMaxSharedMemoryPerBlockOptin), properties.name};
}

inline const Device& Device::of(int device) {
  constexpr int kMost = 64;
  static Device known[kMost];
  static std::once_flag read[kMost];
  STD_TORCH_CHECK(device >= 0 && device < kMost, "grace: no such device: ", device);
  std::call_once(read[device], [device] {
    int before = 0;
    check_cuda(cudaGetDevice(&before), "asking for the device");
    check_cuda(cudaSetDevice(device), "choosing a device");
    known[device] = read_device(device);
    check_cuda(cudaSetDevice(before), "choosing a device");
  });
  return known[device];
}

#endif

}  // namespace grace
