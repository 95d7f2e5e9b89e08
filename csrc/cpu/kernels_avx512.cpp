// The GEMM engine at the level "avx512". Compiled with that instruction set: nothing but extern "C" symbols may leave.
#include "cpu/simd_avx512.h"
// Above: the vector operations that the headers below are written in.
#include "cpu/gemm_kernel.h"
#include "cpu/passes_kernel.h"
#include "cpu/prefix_kernel.h"

extern "C" const peftkern::GemmKernels peftkern_gemm_avx512 = {peftkern::run_tile<peftkern::Fp32Dot>,
                                                               peftkern::Workspace::bytes, peftkern::split_dropout,
                                                               peftkern::scale_columns, peftkern::sum_rows};

extern "C" const peftkern::PrefixKernels peftkern_prefix_avx512 = {peftkern::prefix_forward, peftkern::prefix_backward,
                                                                   peftkern::sum_parts};
