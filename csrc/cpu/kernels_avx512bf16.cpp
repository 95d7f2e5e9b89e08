// The engine's kernels at the level "avx512bf16". Compiled with that instruction set: nothing but extern "C" symbols
// may leave.
#include "cpu/simd_avx512.h"
// Above: the vector operations that the headers below are written in.
#include "cpu/decode_bf16.h"
#include "cpu/kernels.h"
#include "cpu/panel_bf16.h"

extern "C" const peftkern::GemmKernels peftkern_gemm_avx512bf16 =
    peftkern::kernels<peftkern::Bf16Dot, peftkern::Decode>();
extern "C" const peftkern::PrefixKernels peftkern_prefix_avx512bf16 = peftkern::prefix_kernels<peftkern::Bf16Dot>();
