// dequant_gemm for few rows of x by wgmma, sm_90a. decode.h says how the work is split.
#include "ops/dequant_gemm/decode.h"

namespace grace::dequant_gemm {

int warpgroup_variants() { return 0; }

template <int kBits, typename T>
bool warpgroup_runs(const Call<T>&, int, int) {
  return false;
}

template <int kBits, typename T>
void warpgroup(const Call<T>&, int, int) {}

#define GRACE_INSTANTIATE(bits, T)                              \
  template bool warpgroup_runs<bits>(const Call<T>&, int, int); \
  template void warpgroup<bits>(const Call<T>&, int, int);
GRACE_INSTANTIATE(4, bf16)
GRACE_INSTANTIATE(4, fp16)
GRACE_INSTANTIATE(8, bf16)
GRACE_INSTANTIATE(8, fp16)
#undef GRACE_INSTANTIATE

}  // namespace grace::dequant_gemm
