// Sixteen bytes of a weight, quantized or with their gradient.
//
// A weight is of T; quantized, and the gradient of that, it is of O: T itself, or 16 bits where T
// is float, for products in mixed precision.
#pragma once

#include <type_traits>

#include "common/vectors.h"
#include "common/warp.h"
#include "ops/fake_quant/fake_quant.h"

namespace grace::fake_quant {

// As many elements of O as a vector of T has.
template <typename T, typename O>
using Packed = std::conditional_t<std::is_same_v<T, O>, uint4, uint2>;

template <typename T, typename O>
__device__ __forceinline__ Packed<T, O> load_packed(const O* from) {
  return __ldg(reinterpret_cast<const Packed<T, O>*>(from));
}

template <typename O, typename P>
__device__ __forceinline__ void store_packed(O* to, P packed) {
  *reinterpret_cast<P*>(to) = packed;
}

template <typename T, typename O>
__device__ __forceinline__ Packed<T, O> pack_as(const float (&from)[kPerVector<T>]) {
  if constexpr (std::is_same_v<T, O>) {
    return pack_vector<T>(from);
  } else {
    return {pair_from_floats<O>(from[0], from[1]), pair_from_floats<O>(from[2], from[3])};
  }
}

template <typename T, typename O>
__device__ __forceinline__ void unpack_as(Packed<T, O> packed, float (&to)[kPerVector<T>]) {
  if constexpr (std::is_same_v<T, O>) {
    unpack_vector<T>(packed, to);
  } else {
    const uint32_t words[2] = {packed.x, packed.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[2 * i] = to_float(O{static_cast<uint16_t>(words[i])});
      to[2 * i + 1] = to_float(O{static_cast<uint16_t>(words[i] >> 16)});
    }
  }
}

// Called, so that the ways that are taken stay short.
template <typename T, typename O>
__device__ __noinline__ Packed<T, O> quantized_irregular(uint4 weight, float scale, Codes codes) {
  float x[kPerVector<T>];
  unpack_vector<T>(weight, x);
#pragma unroll
  for (float& w : x) w = fake_quantize(w, scale, codes);
  return pack_as<T, O>(x);
}

template <typename T, typename O>
__device__ __forceinline__ Packed<T, O> quantized(uint4 weight, const Divisor& by, Codes codes) {
  if (!by.regular()) return quantized_irregular<T, O>(weight, by.scale, codes);
  float x[kPerVector<T>];
  unpack_vector<T>(weight, x);
#pragma unroll
  for (float& w : x) w = rintf(value_within(w, by, codes)) * by.scale;
  return pack_as<T, O>(x);
}

struct VectorGradient {
  uint4 weight;
  float log_scale;  // the sum of this vector's parts
};

template <typename T, typename O>
__device__ __noinline__ VectorGradient gradient_irregular(Packed<T, O> grad, uint4 weight,
                                                          float scale, Codes codes) {
  float g[kPerVector<T>], w[kPerVector<T>], sum = 0.0f;
  unpack_as<T, O>(grad, g);
  unpack_vector<T>(weight, w);
#pragma unroll
  for (int i = 0; i < static_cast<int>(kPerVector<T>); ++i) {
    const Gradient one = gradient_of(g[i], w[i], scale, codes);
    g[i] = one.weight;
    sum += one.log_scale;
  }
  return {pack_vector<T>(g), sum};
}

template <typename T, typename O>
__device__ __forceinline__ VectorGradient gradient(Packed<T, O> grad, uint4 weight,
                                                   const Divisor& by, Codes codes) {
  if (!by.regular()) return gradient_irregular<T, O>(grad, weight, by.scale, codes);
  float g[kPerVector<T>], w[kPerVector<T>], sum = 0.0f;
  unpack_as<T, O>(grad, g);
  unpack_vector<T>(weight, w);
#pragma unroll
  for (int i = 0; i < static_cast<int>(kPerVector<T>); ++i) {
    const Gradient one = gradient_by(g[i], w[i], by, codes);
    g[i] = one.weight;
    sum += one.log_scale;
  }
  return {pack_vector<T>(g), sum * by.scale};
}

// Sum over neighbouring lanes, a power of two of them.
__device__ __forceinline__ float sum_over_lanes(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

}  // namespace grace::fake_quant
