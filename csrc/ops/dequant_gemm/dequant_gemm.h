// The packed layout of dequant_gemm and the exact arithmetic on its codes, the same on every
// device. grace/packing.py makes the layout and describes it; docs/ops/dequant_gemm.md draws it.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/numeric.h"

namespace grace::dequant_gemm {

constexpr int kTile = 64;   // rows and columns of a packed tile
constexpr int kBand = 16;   // rows of an mma fragment: a tile has four bands
constexpr int kBlock = 16;  // columns of an mma fragment: a tile has four blocks
constexpr int kBlocksPerTile = kTile / kBlock;

template <int kBits>
struct Layout {
  static constexpr int kBandWords = kBand * kTile * kBits / 32;
  static constexpr int kTileWords = kTile * kTile * kBits / 32;
  static constexpr int kBlockWords = kBits / 4;  // that a lane holds of a 16 x 16 block
};

// Sizes of one call, checked before a kernel sees them.
struct Problem {
  int64_t m;           // rows of x
  int64_t n;           // out_features
  int64_t k;           // in_features
  int64_t n_tiles;     // ceil(n / 64)
  int64_t k_tiles;     // ceil(k / 64)
  int64_t group_size;  // columns that share a scale; with one group a row: all the padded ones

  GRACE_HOST_DEVICE int64_t groups() const { return (k + group_size - 1) / group_size; }

  // No block of 16 columns straddles two groups: what the fast kernels ask for.
  GRACE_HOST_DEVICE bool whole_blocks() const { return group_size % kBlock == 0; }
};

// The packed scales [groups, 64 * n_tiles], in the dtype they came in.
struct Scales {
  const void* data;
  int64_t stride;
  bool is_float;
  bool is_bf16;  // else fp16

  GRACE_HOST_DEVICE float at(int64_t group, int64_t row) const {
    const int64_t i = group * stride + row;
    if (is_float) return static_cast<const float*>(data)[i];
    if (is_bf16) return to_float(static_cast<const bf16*>(data)[i]);
    return to_float(static_cast<const fp16*>(data)[i]);
  }
};

// One call on contiguous tensors. With swiglu, rows of the weight alternate by eights, gate and up
// (grace.packing.interleave), so that rows r and r + 8 of a band make one output.
template <typename T>
struct Call {
  Problem problem;
  const T* x;               // [m, k]
  const uint32_t* qweight;  // [n_tiles, k_tiles, words of a tile]
  Scales scales;
  const T* bias;      // [n] or null
  const T* residual;  // [m, columns()] or null: added last
  T* out;             // [m, columns()]
  bool swiglu;
  bool settled;  // the weight may be read while the kernel ahead still runs

  GRACE_HOST_DEVICE int64_t columns() const { return swiglu ? problem.n / 2 : problem.n; }

  // A sum with its bias; rows of the padding have none.
  GRACE_HOST_DEVICE float biased(float sum, int64_t row) const {
    return bias != nullptr && row < problem.n ? sum + to_float(bias[row]) : sum;
  }

  // The output at [m][column] from its value: the residual, and the one rounding.
  GRACE_HOST_DEVICE T finished(float value, int64_t m, int64_t column) const {
    if (residual != nullptr) value += to_float(residual[m * columns() + column]);
    return from_float<T>(value);
  }
};

// silu(gate) * up, and where it goes: the column of the output that a gate's row makes.
GRACE_HOST_DEVICE float swiglu(float gate, float up) {
#if defined(__CUDA_ARCH__)
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;  // a few units in the last place of fp32
#else
  return gate / (1.0f + expf(-gate)) * up;
#endif
}
GRACE_HOST_DEVICE int64_t swiglu_column(int64_t gate_row) {
  return gate_row / kBand * (kBand / 2) + gate_row % (kBand / 2);
}

// Two neighbours of a row, offset codes at bits 0 and 16 with others above them, of one band of a
// tile: columns 16 * block + 8 * c8 + 2 * (lane % 4) and the next, row lane / 4 + 8 * r8.
template <int kBits>
GRACE_HOST_DEVICE uint32_t pair_at(const uint32_t* band, int block, int lane, int c8, int r8) {
  if constexpr (kBits == 4) return band[lane * 4 + block] >> (8 * c8 + 4 * r8);
  return band[block / 2 * 128 + lane * 4 + block % 2 * 2 + c8] >> (8 * r8);
}

// One code, found where grace.packing put it: for kernels that read codes one at a time.
template <int kBits>
GRACE_HOST_DEVICE int code_at(const uint32_t* qweight, int64_t k_tiles, int64_t row,
                              int64_t column) {
  const int r = static_cast<int>(row % kTile), c = static_cast<int>(column % kTile);
  const int64_t tile = row / kTile * k_tiles + column / kTile;
  const uint32_t* band =
      qweight + tile * Layout<kBits>::kTileWords + r / kBand * Layout<kBits>::kBandWords;
  const uint32_t pair =
      pair_at<kBits>(band, c / kBlock, r % 8 * 4 + c % 8 / 2, c / 8 % 2, r / 8 % 2);
  return static_cast<int>(pair >> (16 * (c % 2)) & ((1u << kBits) - 1)) - (1 << (kBits - 1));
}

// --- codes as operand registers of a tensor core: pairs of bf16 or fp16 -------------------------

// a * b + c on both halves of a register. The host's version is exact for the integers used here.
template <typename T>
GRACE_HOST_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
#else
  uint32_t d = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto half = [shift](uint32_t pair) {
      return to_float(T{static_cast<uint16_t>(pair >> shift)});
    };
    d |= uint32_t{from_float<T>(half(a) * half(b) + half(c)).bits} << shift;
  }
  return d;
#endif
}

template <typename T>
struct Half;  // bit patterns of small integers

template <>
struct Half<bf16> {
  static constexpr uint32_t kMagic = 0x43004300u;  // 128: an OR adds any integer below 128 exactly
  static constexpr uint32_t kOne = 0x3f803f80u, kSixteen = 0x41804180u;
  static constexpr uint32_t kMinus128 = 0xc300c300u, kMinusMagicAnd8 = 0xc308c308u;
};

template <>
struct Half<fp16> {
  static constexpr uint32_t kMagic =
      0x64006400u;  // 1024: an OR adds any integer below 1024 exactly
  static constexpr uint32_t kOne = 0x3c003c00u;
  static constexpr uint32_t kMinusMagicAnd8 = 0xe408e408u, kMinusMagicAnd128 = 0xe480e480u;
};

// Two 4-bit codes + 8, at bits 0-3 and 16-19, as the signed codes.
template <typename T>
GRACE_HOST_DEVICE uint32_t signed_nibbles(uint32_t nibbles) {
  return fma_pair<T>((nibbles & 0x000f000fu) | Half<T>::kMagic, Half<T>::kOne,
                     Half<T>::kMinusMagicAnd8);
}

// Two 8-bit codes + 128, at bits 0-7 and 16-23, as the signed codes. bf16 has 8 significant bits,
// too few for an offset of 128 on top of a byte, so there the two nibbles are put together: every
// step is an integer of at most 8 bits.
template <typename T>
GRACE_HOST_DEVICE uint32_t signed_bytes(uint32_t bytes) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t high =
        signed_nibbles<bf16>(bytes >> 4);  // code = 16 * high + low, high in [-8, 7]
    const uint32_t low = (bytes & 0x000f000fu) | Half<bf16>::kMagic;
    return fma_pair<bf16>(fma_pair<bf16>(high, Half<bf16>::kSixteen, low), Half<bf16>::kOne,
                          Half<bf16>::kMinus128);
  } else {
    return fma_pair<fp16>((bytes & 0x00ff00ffu) | Half<fp16>::kMagic, Half<fp16>::kOne,
                          Half<fp16>::kMinusMagicAnd128);
  }
}

// A lane's part of a 16 x 16 block, from its words to the four registers of operand A.
template <int kBits, typename T>
GRACE_HOST_DEVICE void decode_block(const uint32_t* words, uint32_t (&a)[4]) {
  for (int p = 0; p < 4; ++p) {
    if constexpr (kBits == 4) {
      a[p] = signed_nibbles<T>(words[0] >> (4 * p));
    } else {
      a[p] = signed_bytes<T>(words[p / 2] >> (8 * (p % 2)));
    }
  }
}

// --- the same with one multiplication less: codes times kFraction --------------------------------

// Read as a number, the pattern of a small integer i is i units of the smallest subnormal, for all
// that matter here (bf16: below 256, across the first binade; fp16: below 1024). One fma brings it
// to i * kFraction - offset * kFraction exactly, wherever in the low byte the code stands.
// kFraction is what keeps the multiplier finite.
template <typename T>
struct Fraction;

template <>
struct Fraction<bf16> {
  static constexpr float kValue = 1.0f / 64;                          // 2^-133 * 2^127
  static constexpr uint32_t kLow = 0x7f007f00u, kHigh = 0x7d007d00u;  // 2^127 and 2^123
  static constexpr uint32_t kMinus8 = 0xbe00be00u, kMinus128 = 0xc000c000u;
};

template <>
struct Fraction<fp16> {
  static constexpr float kValue = 1.0f / 512;                         // 2^-24 * 2^15
  static constexpr uint32_t kLow = 0x78007800u, kHigh = 0x68006800u;  // 2^15 and 2^11
  static constexpr uint32_t kMinus8 = 0xa400a400u, kMinus128 = 0xb400b400u;
};

// A lane's part of a 16 x 16 block, from its words to the four registers of operand A.
template <int kBits, typename T>
GRACE_HOST_DEVICE void decode_fractions(const uint32_t* words, uint32_t (&a)[4]) {
  using F = Fraction<T>;
  for (int p = 0; p < 4; ++p) {
    if constexpr (kBits == 4) {
      const uint32_t pair = p < 2 ? words[0] : words[0] >> 8;
      a[p] = p % 2 == 0 ? fma_pair<T>(pair & 0x000f000fu, F::kLow, F::kMinus8)
                        : fma_pair<T>(pair & 0x00f000f0u, F::kHigh, F::kMinus8);
    } else {
      a[p] = fma_pair<T>(words[p / 2] >> (8 * (p % 2)) & 0x00ff00ffu, F::kLow, F::kMinus128);
    }
  }
}

// --- the same times the scale: weights as training had them --------------------------------------

// One half of a register in both.
GRACE_HOST_DEVICE uint32_t pair_of(uint32_t bits) { return bits | bits << 16; }

// a * b, rounded once.
template <typename T>
GRACE_HOST_DEVICE uint32_t mul_pair(uint32_t a, uint32_t b) {
  return fma_pair<T>(a, b, 0x80008000u);  // minus zero: it leaves every product as it is
}

// What makes weights of one row's codes: code * scale * kFraction, rounded once to T.
//
// With bf16 the pattern of a code is its number, in units of 2^-133 as above, and one fma does all
// of it: the products that it adds are exact. kFraction keeps its multiplier finite for scales
// below 2^25, and scales down to 2^-90 keep their precision.
template <int kBits, typename T>
struct RowScale;

template <int kBits>
struct RowScale<kBits, bf16> {
  static constexpr float kFraction = 1.0f / (1 << 30);
  uint32_t low, high, offset;

  GRACE_HOST_DEVICE void set(uint32_t scale) {
    const uint32_t pair = pair_of(scale);
    low = mul_pair<bf16>(pair, 0x73007300u);                                // 2^103
    if constexpr (kBits == 4) high = mul_pair<bf16>(pair, 0x71007100u);     // 2^99
    offset = mul_pair<bf16>(pair, kBits == 4 ? 0xb200b200u : 0xb400b400u);  // -2^-27, -2^-23
  }
};

template <int kBits>
struct RowScale<kBits, fp16> {
  static constexpr float kFraction = 1.0f;
  uint32_t scale;

  GRACE_HOST_DEVICE void set(uint32_t bits) { scale = pair_of(bits); }
};

// A lane's part of a 16 x 16 block, from its words to the four registers of operand A, with the
// scales of rows lane / 4 and lane / 4 + 8.
template <int kBits, typename T>
GRACE_HOST_DEVICE void decode_weights(const uint32_t* words, const RowScale<kBits, T> (&rows)[2],
                                      uint32_t (&a)[4]) {
  if constexpr (std::is_same_v<T, fp16>) {
    decode_block<kBits, T>(words, a);
    for (int p = 0; p < 4; ++p) a[p] = mul_pair<T>(a[p], rows[p % 2].scale);
  } else if constexpr (kBits == 4) {
    for (int p = 0; p < 4; ++p) {
      const uint32_t pair = p < 2 ? words[0] : words[0] >> 8;
      const RowScale<4, T>& row = rows[p % 2];
      a[p] = p % 2 == 0 ? fma_pair<T>(pair & 0x000f000fu, row.low, row.offset)
                        : fma_pair<T>(pair & 0x00f000f0u, row.high, row.offset);
    }
  } else {
    for (int p = 0; p < 4; ++p) {
      const RowScale<8, T>& row = rows[p % 2];
      a[p] = fma_pair<T>(words[p / 2] >> (8 * (p % 2)) & 0x00ff00ffu, row.low, row.offset);
    }
  }
}

}  // namespace grace::dequant_gemm
