// Tensor-core products of one warp, fp32 accumulation: d += a b with mma.sync, sm_80 and later.
//
// m16n8k16, with gid = lane / 4 and tig = lane % 4; a register holds two neighbours, the first in
// its low half:
//   a[0], a[1]  rows gid, gid + 8, columns 2 tig, 2 tig + 1      (a[2], a[3]: columns + 8)
//   b[0], b[1]  rows 2 tig, 2 tig + 1 (b[1]: + 8), column gid
//   d[0], d[1]  row gid, columns 2 tig, 2 tig + 1                (d[2], d[3]: row gid + 8)
//
// load_fragments fetches four 8 x 8 matrices of 16-bit elements from shared memory, of which lane l
// points at row l % 8 of matrix l / 8, 16 bytes: v[i] is row gid, columns 2 tig, 2 tig + 1 of
// matrix i, or with kTurned column gid, rows 2 tig, 2 tig + 1.
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

template <bool kTurned>
void load_fragments(uint32_t (&v)[4], const void* row) {
  uint16_t mine[8], all[kWarpSize][8];
  std::memcpy(mine, row, sizeof mine);
  emulation::warp_gather(kFullWarp, mine, all, sizeof mine);
  const int gid = emulation::lane() / 4, tig = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int k) { return kTurned ? all[i * 8 + k][gid] : all[i * 8 + gid][k]; };
    v[i] = at(2 * tig) | uint32_t{at(2 * tig + 1)} << 16;
  }
}

#else

template <bool kTurned>
__device__ __forceinline__ void load_fragments(uint32_t (&v)[4], uint32_t row) {
  if constexpr (kTurned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
  }
}
template <bool kTurned>
__device__ __forceinline__ void load_fragments(uint32_t (&v)[4], const void* row) {
  load_fragments<kTurned>(v, shared_address(row));
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
