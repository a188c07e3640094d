// CUDA C++ on a CPU, for tests without a GPU: enough of the language for the portable kernels.
//
// A block runs on one OS thread, each of its CUDA threads a fiber. `__shared__` variables are
// static storage of that OS thread; barriers and warp exchanges switch fibers. What a GPU leaves
// undefined is an error here: a barrier that some threads never reach, an exchange with a lane that
// has exited, shared memory read before it was written (it is filled with NaN where it is dynamic).
// Not emulated: memory ordering between barriers, atomics, asynchronous copies, timing.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __noinline__
#define __grid_constant__
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  template <typename X>
  dim3(X x_, unsigned y_ = 1, unsigned z_ = 1) : x(static_cast<unsigned>(x_)), y(y_), z(z_) {}
};

namespace grace::emulation {

struct Thread {
  dim3 index;
  dim3 block_index;
  dim3 block_dim;
  dim3 grid_dim;
};

// The CUDA thread that is running.
const Thread& thread();

// Runs `body` once for every thread of every block; blocks one after another. Throws
// std::runtime_error where a GPU's behaviour would be undefined.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

unsigned char* dynamic_shared();

void block_barrier();

// Every lane in `mask` contributes `bytes` (at most 64) at `value`; once all have, the calling lane
// reads those of `source`, which must be one of them.
void warp_exchange(unsigned mask, const void* value, void* result, size_t bytes, int source);

// As above, and the caller gets the contributions of all 32 lanes, `bytes` apart, at `results`.
void warp_gather(unsigned mask, const void* value, void* results, size_t bytes);

inline int lane() {
  const Thread& t = thread();
  return static_cast<int>((t.index.x + t.block_dim.x * (t.index.y + t.block_dim.y * t.index.z)) %
                          32);
}

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  T result;
  warp_exchange(mask, &value, &result, sizeof(T), source);
  return result;
}

}  // namespace grace::emulation

#define threadIdx (::grace::emulation::thread().index)
#define blockIdx (::grace::emulation::thread().block_index)
#define blockDim (::grace::emulation::thread().block_dim)
#define gridDim (::grace::emulation::thread().grid_dim)

inline void __syncthreads() { grace::emulation::block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  grace::emulation::shuffle(mask, 0, grace::emulation::lane());
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return grace::emulation::shuffle(mask, value, source & 31);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return grace::emulation::shuffle(mask, value, grace::emulation::lane() ^ lane_mask);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int source = grace::emulation::lane() + static_cast<int>(delta);
  return grace::emulation::shuffle(mask, value, source < 32 ? source : grace::emulation::lane());
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) int4 {
  int32_t x, y, z, w;
};
