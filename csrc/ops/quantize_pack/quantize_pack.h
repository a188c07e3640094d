// Putting codes where grace.packing puts them: bytes of codes to the words of the packed layout
// (csrc/ops/dequant_gemm/dequant_gemm.h reads them; docs/ops/dequant_gemm.md draws them).
#pragma once

#include <cstdint>

#include "common/numeric.h"

namespace grace::quantize_pack {

// The low bytes of four words, in order.
GRACE_HOST_DEVICE uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
#else
  return (a & 255u) | (b & 255u) << 8 | (c & 255u) << 16 | (d & 255u) << 24;
#endif
}

// Two pairs of bytes as first, first, second, second.
GRACE_HOST_DEVICE uint32_t alternate(uint32_t pair, uint32_t other) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(pair, other, 0x5140);
#else
  return (pair & 255u) | (other & 255u) << 8 | (pair & 0xff00u) << 8 | (other & 0xff00u) << 16;
#endif
}

// Where a lane finds the codes of a 16 x 16 block: pairs of neighbours, offset codes in bytes.
//   pairs[c8][r8]: columns 2 tig + 8 c8 and the next, row gid + 8 r8
struct Pairs {
  uint32_t at[2][2];
};

// The block's word at 4 bits: the two rows are the nibbles of a byte.
GRACE_HOST_DEVICE uint32_t word_4(const Pairs& pairs) {
  return alternate(pairs.at[0][0] | pairs.at[0][1] << 4, pairs.at[1][0] | pairs.at[1][1] << 4);
}

// One of the block's two words at 8 bits: the two rows are neighbouring bytes.
GRACE_HOST_DEVICE uint32_t word_8(const Pairs& pairs, int c8) {
  return alternate(pairs.at[c8][0], pairs.at[c8][1]);
}

}  // namespace grace::quantize_pack
