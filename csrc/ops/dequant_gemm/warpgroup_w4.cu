// The kernels of warpgroup.h for 4 bits.
#include "ops/dequant_gemm/warpgroup.h"

namespace grace::dequant_gemm {

int warpgroup_variants() { return kWarpgroupVariants; }

template bool warpgroup_runs<4>(const Call<bf16>&, int, int);
template bool warpgroup_runs<4>(const Call<fp16>&, int, int);
template void warpgroup<4>(const Call<bf16>&, int, int);
template void warpgroup<4>(const Call<fp16>&, int, int);

}  // namespace grace::dequant_gemm
