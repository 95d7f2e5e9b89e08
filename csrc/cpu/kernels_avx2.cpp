// The engine's kernels at the level "avx2". Compiled with that instruction set: nothing but extern "C" symbols may
// leave.
#include "cpu/simd_avx2.h"
// Above: the vector operations that the header below is written in.
#include "cpu/kernels.h"

extern "C" const peftkern::GemmKernels peftkern_gemm_avx2 = peftkern::kernels<peftkern::Fp32Dot>();
extern "C" const peftkern::PrefixKernels peftkern_prefix_avx2 = peftkern::prefix_kernels<peftkern::Fp32Dot>();
