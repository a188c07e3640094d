// Asynchronous copies of 16 bytes from global to shared memory, sm_80 and later, by groups:
//
//   copy_async(to, from, inside) ...; commit_copies();      one group, any number of copies
//   wait_for_copies<kPending>();                            until at most so many groups run
//
// and a barrier, before threads read what others copied.
#pragma once

#include "common/launch.h"

namespace grace {

#if defined(GRACE_EMULATE)

inline void copy_async(void* to, const void* from, bool inside) {
  inside ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
}
inline void commit_copies() {}
template <int kPending>
void wait_for_copies() {}

#else

// Zeros instead of what is not `inside`; `from` is then not read, but must be an address.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace grace
