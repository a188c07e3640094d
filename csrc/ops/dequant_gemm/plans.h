// The kernels of dequant_gemm by number, and which of them runs a call.
//
// A plan is a family of kernels and a variant of it: plan = 1000 * family + variant. Every family
// is one file that offers, for element types bf16 and fp16 and for 4 and 8 bits,
//   <family>_variants()                  how many there are: numbers 0 ... n - 1 (0 in a build that
//                                        lacks the family)
//   <family>_runs<bits>(call, variant, device)   whether that variant can compute this call
//   <family><bits>(call, variant, device)        does it, on the current stream
#pragma once

#include <string>

#include "ops/dequant_gemm/call.h"

namespace grace::dequant_gemm {

enum class Family {
  kAnyGroup = 0,   // dequant_gemm.cu: any call, slowly
  kPortable = 1,   // dequant_gemm.cu: mma.sync, x by tiles through shared memory
  kDecode = 2,     // decode.cu: few rows of x, which stay in shared memory; mma.sync
  kWarpgroup = 3,  // warpgroup.h: a ring of stages; wgmma, sm_90a
};

struct Plan {
  Family family;
  int variant;
};

constexpr int64_t kFamilies = 1000;  // a plan's number is 1000 * family + variant
inline Plan plan_of(int64_t number) {
  return {static_cast<Family>(number / kFamilies), static_cast<int>(number % kFamilies)};
}

// The measured plan of the most similar layer for this many rows of x, or -1 where nothing was
// measured: on this GPU, or on the one whose name begins most like its own. Sizes of a layer are
// similar when their logarithms are.
int64_t measured_plan(const std::string& gpu, int64_t bits, int64_t m, int64_t n, int64_t k);

int decode_variants();
template <int kBits, typename T>
bool decode_runs(const Call<T>& call, int variant, int device);
template <int kBits, typename T>
void decode(const Call<T>& call, int variant, int device);

int warpgroup_variants();
template <int kBits, typename T>
bool warpgroup_runs(const Call<T>& call, int variant, int device);
template <int kBits, typename T>
void warpgroup(const Call<T>& call, int variant, int device);

}  // namespace grace::dequant_gemm
