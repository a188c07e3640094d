// Placeholder until the wgmma kernels are here.
#include "ops/dequant_gemm/plans.h"
namespace grace::dequant_gemm {
int prefill_variants() { return 0; }
template <int kBits, typename T>
bool prefill_runs(const Call<T>&, int, int) { return false; }
template <int kBits, typename T>
void prefill(const Call<T>&, int, int) {}
#define GRACE_INSTANTIATE(bits, T) \
  template bool prefill_runs<bits>(const Call<T>&, int, int); \
  template void prefill<bits>(const Call<T>&, int, int);
GRACE_INSTANTIATE(4, bf16)
GRACE_INSTANTIATE(4, fp16)
GRACE_INSTANTIATE(8, bf16)
GRACE_INSTANTIATE(8, fp16)
}  // namespace grace::dequant_gemm
