// The GPU that a kernel is launched on: what a launch's shape is chosen by.
#pragma once

#include <string>

#include "common/launch.h"

#if !defined(GRACE_EMULATE)
#include <mutex>
#endif

namespace grace {

struct Device {
  int capability, processors, shared_bytes;
  std::string name;

  static const Device& of(int device);
};

#if defined(GRACE_EMULATE)

inline const Device& Device::of(int) {
  static const Device emulated{80, 2, 227 * 1024, "emulated"};
  return emulated;
}

#else

inline Device read_device(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "reading a device's properties");
  const auto get = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "reading a device attribute");
    return value;
  };
  return {get(cudaDevAttrComputeCapabilityMajor) * 10 + get(cudaDevAttrComputeCapabilityMinor),
          get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          properties.name};
}

inline const Device& Device::of(int device) {
  constexpr int kMost = 64;
  static Device known[kMost];
  static std::once_flag read[kMost];
  STD_TORCH_CHECK(device >= 0 && device < kMost, "grace: no such device: ", device);
  std::call_once(read[device], [device] { known[device] = read_device(device); });
  return known[device];
}

#endif

}  // namespace grace
