// Tensor-core products of a warpgroup (four warps), fp32 accumulation: d += a b with wgmma, sm_90a.
//
// m64nNk16: a is in registers, every warp's 16 rows as mma.m16n8k16 has them (mma.h); b is in
// shared memory, [N][64 columns] of 16 bits with TMA's swizzle of 128 bytes, named by a descriptor;
// d has N / 8 fragments of m16n8 a warp, each d[0..3] of mma.h. The product runs on while the warps
// go on:
//
//   wgmma_fence(); wgmma<T, N>(d, a, b) ...; wgmma_commit();
//   wgmma_wait(); fence_operands(d);
//
// and between fence and wait neither d nor a is touched.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/numeric.h"

namespace grace {

// Tells the compiler that registers are read and written here, which an asynchronous product does
// behind its back.
template <int kCount>
__device__ __forceinline__ void fence_operands(float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending committed groups run.
template <int kPending = 0>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Operand b, from the address in shared memory of its first row, a multiple of 1024 bytes: the low
// half of a descriptor. The next 16 columns are at + 2.
__device__ __forceinline__ uint32_t wgmma_operand(uint32_t address) {
  return 1 << 16 | (address & 0x3ffff) / 16;
}

// The high half: TMA's swizzle of 128 bytes, and eight rows from one such pattern to the next.
#define GRACE_B_HIGH "0x40000040"

template <typename T, int kN>
struct Wgmma;

// clang-format off
#define GRACE_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define GRACE_R1 GRACE_R0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define GRACE_R2 GRACE_R1 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define GRACE_R3 GRACE_R2 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define GRACE_R4 GRACE_R3 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define GRACE_R5 GRACE_R4 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define GRACE_R6 GRACE_R5 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define GRACE_R7 GRACE_R6 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define GRACE_R8 GRACE_R7 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define GRACE_R9 GRACE_R8 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define GRACE_R10 GRACE_R9 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define GRACE_R11 GRACE_R10 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define GRACE_R12 GRACE_R11 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define GRACE_R13 GRACE_R12 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define GRACE_R14 GRACE_R13 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define GRACE_R15 GRACE_R14 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define GRACE_D0(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                    "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define GRACE_D1(i) GRACE_D0(i), GRACE_D0(i + 8)
#define GRACE_D3(i) GRACE_D1(i), GRACE_D1(i + 16)
#define GRACE_D5(i) GRACE_D3(i), GRACE_D1(i + 32)
#define GRACE_D7(i) GRACE_D3(i), GRACE_D3(i + 32)
#define GRACE_D9(i) GRACE_D7(i), GRACE_D1(i + 64)
#define GRACE_D10(i) GRACE_D9(i), GRACE_D0(i + 80)
#define GRACE_D11(i) GRACE_D7(i), GRACE_D3(i + 64)
#define GRACE_D13(i) GRACE_D11(i), GRACE_D1(i + 96)
#define GRACE_D15(i) GRACE_D7(i), GRACE_D7(i + 64)
// clang-format on

// LAST: of the eights of registers of d, numbered from 0. A and DESC: the operands after them.
#define GRACE_WGMMA(TYPE, NAME, N, LAST, A, DESC)                                                  \
  template <>                                                                                      \
  struct Wgmma<TYPE, N> {                                                                          \
    static __device__ __forceinline__ void run(float (&d)[N / 2], const uint32_t* a, uint32_t b) { \
      asm volatile("{\n.reg .b64 b;\nmov.b64 b, {" DESC ", " GRACE_B_HIGH                          \
                   "};\n"                                                                          \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                 \
                   " {" GRACE_R##LAST "}, {" A "}, b, 1, 1, 1, 0;\n}"                              \
                   : GRACE_D##LAST(0)                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));                          \
    }                                                                                              \
  };
#define GRACE_WGMMAS(N, LAST, A, DESC)        \
  GRACE_WGMMA(bf16, "bf16", N, LAST, A, DESC) \
  GRACE_WGMMA(fp16, "f16", N, LAST, A, DESC)
GRACE_WGMMAS(32, 1, "%16, %17, %18, %19", "%20")
GRACE_WGMMAS(64, 3, "%32, %33, %34, %35", "%36")
GRACE_WGMMAS(96, 5, "%48, %49, %50, %51", "%52")
GRACE_WGMMAS(128, 7, "%64, %65, %66, %67", "%68")
GRACE_WGMMAS(160, 9, "%80, %81, %82, %83", "%84")
GRACE_WGMMAS(176, 10, "%88, %89, %90, %91", "%92")
GRACE_WGMMAS(192, 11, "%96, %97, %98, %99", "%100")
GRACE_WGMMAS(224, 13, "%112, %113, %114, %115", "%116")
GRACE_WGMMAS(256, 15, "%128, %129, %130, %131", "%132")
#undef GRACE_WGMMAS
#undef GRACE_WGMMA

// Both operands in shared memory, fp16: a as [64 rows][64 depths] with the swizzle; b as above, or
// with kTurned as [64 depths][64 columns] for every 64 columns, 8 KiB one after another.
template <int kN, bool kTurned>
struct SharedWgmma;

// TURNED: 0 or 1, as the instruction and the template name it.
#define GRACE_WGMMA(N, TURNED, LAST, A, B)                                                     \
  template <>                                                                                  \
  struct SharedWgmma<N, TURNED> {                                                              \
    static __device__ __forceinline__ void run(float* d, uint32_t a, uint32_t b) {             \
      asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {" A ", " GRACE_B_HIGH "};\nmov.b64 b, {" B \
                   ", " GRACE_B_HIGH "};\nwgmma.mma_async.sync.aligned.m64n" #N                \
                   "k16.f32.f16.f16 {" GRACE_R##LAST "}, a, b, 1, 1, 1, 0, " #TURNED ";\n}"    \
                   : GRACE_D##LAST(0)                                                          \
                   : "r"(a), "r"(b));                                                          \
    }                                                                                          \
  };
GRACE_WGMMA(64, 0, 3, "%32", "%33")
GRACE_WGMMA(128, 0, 7, "%64", "%65")
GRACE_WGMMA(192, 0, 11, "%96", "%97")
GRACE_WGMMA(192, 1, 11, "%96", "%97")
#undef GRACE_WGMMA

// The low half of a turned operand's descriptor: 8 KiB from 64 columns to the next. Its next 16
// depths are at + 128.
__device__ __forceinline__ uint32_t turned_wgmma_operand(uint32_t address) {
  return 512 << 16 | (address & 0x3ffff) / 16;
}

// Stores four 8 x 8 matrices of 16-bit elements turned round, each fragment held as mma.h's a: this
// lane's `to` is where column lane % 8 of matrix lane / 8 goes, 16 bytes.
__device__ __forceinline__ void store_turned(uint32_t to, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// d += a b.
template <typename T, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t* a, uint32_t b) {
  Wgmma<T, kN>::run(d, a, b);
}

#endif

}  // namespace grace
