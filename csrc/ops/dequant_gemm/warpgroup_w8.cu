// The kernels of warpgroup.h for 8 bits.
#include "ops/dequant_gemm/warpgroup.h"

namespace grace::dequant_gemm {

template bool warpgroup_runs<8>(const Call<bf16>&, int, int);
template bool warpgroup_runs<8>(const Call<fp16>&, int, int);
template void warpgroup<8>(const Call<bf16>&, int, int);
template void warpgroup<8>(const Call<fp16>&, int, int);

}  // namespace grace::dequant_gemm
