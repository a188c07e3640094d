// Sixteen bytes of a tensor at a time, in registers and as floats.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/launch.h"
#include "common/numeric.h"

namespace grace {

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);  // elements of sixteen bytes

inline bool is_vector_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Of memory that nothing writes while the kernel runs.
template <typename T>
__device__ __forceinline__ uint4 load_vector(const T* from) {
  return __ldg(reinterpret_cast<const uint4*>(from));
}

// Of memory that the kernel ahead of a dependent one wrote: not by the read-only path.
template <typename T>
__device__ __forceinline__ uint4 load_written_vector(const T* from) {
  return *reinterpret_cast<const uint4*>(from);
}

// Asks for the sector there. Unlike a load it is harmless before wait_for_previous_kernel: what
// another kernel writes there later goes to the same cache.
__device__ __forceinline__ void prefetch_to_l2([[maybe_unused]] const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

template <typename T>
__device__ __forceinline__ void store_vector(T* to, uint4 vector) {
  *reinterpret_cast<uint4*>(to) = vector;
}

template <typename T>
__device__ __forceinline__ void unpack_vector(uint4 vector, float (&to)[kPerVector<T>]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      to[i] = float_of_bits(words[i]);
    } else {
      to[2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
      to[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack_vector(const float (&from)[kPerVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = bits_of(from[i]);
    } else {
      words[i] = pair_from_floats<T>(from[2 * i], from[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace grace
