// Tensor-core products of one warp, fp32 accumulation: d += a b with mma.sync, sm_80 and later.
//
// m16n8k16, with gid = lane / 4 and tig = lane % 4; a register holds two neighbours, the first in
// its low half:
//   a[0], a[1]  rows gid, gid + 8, columns 2 tig, 2 tig + 1      (a[2], a[3]: columns + 8)
//   b[0], b[1]  rows 2 tig, 2 tig + 1 (b[1]: + 8), column gid
//   d[0], d[1]  row gid, columns 2 tig, 2 tig + 1                (d[2], d[3]: row gid + 8)
//
// load_matrices: four 8 x 8 matrices from shared memory, each as one register of operand b: this
// lane's `from` is where row lane % 8 of matrix lane / 8 begins, 16 bytes.
#pragma once

#include <type_traits>

#include "common/launch.h"
#include "common/shared_memory.h"
#include "common/warp.h"

namespace grace {

#if defined(GRACE_EMULATE)

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  Operands mine, all[kWarpSize];
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  emulation::warp_gather(kFullWarp, &mine, all, sizeof mine);

  const auto half = [](uint32_t pair, int k) {
    return to_float(T{static_cast<uint16_t>(pair >> (16 * (k % 2)))});
  };
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float x = half(all[row * 4 + k % 8 / 2].a[i / 2 + k / 8 * 2], k);
      d[i] += x * half(all[column * 4 + k % 8 / 2].b[k / 8], k);
    }
  }
}

inline void load_matrices(const unsigned char* from, uint32_t (&v)[4]) {
  const unsigned char* rows[kWarpSize];
  emulation::warp_gather(kFullWarp, &from, rows, sizeof from);
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i)
    std::memcpy(&v[i], rows[8 * i + lane / 4] + lane % 4 * 4, sizeof v[i]);
}

#else

__device__ __forceinline__ void load_matrices(uint32_t from, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void load_matrices(const unsigned char* from, uint32_t (&v)[4]) {
  load_matrices(shared_address(from), v);
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, fp16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#endif

}  // namespace grace
