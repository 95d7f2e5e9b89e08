// The GEMM engine at the level "avx512bf16". Compiled with that instruction set: nothing but extern "C" symbols may
// leave.
#include "cpu/simd_avx512.h"
// Above: the vector operations that the headers below are written in.
#include "cpu/decode_bf16.h"
#include "cpu/gemm_kernel.h"
#include "cpu/panel_bf16.h"
#include "cpu/passes_kernel.h"
#include "cpu/prefix_kernel.h"

extern "C" const peftkern::GemmKernels peftkern_gemm_avx512bf16 = {
    peftkern::run_tile<peftkern::Bf16Dot, peftkern::Decode>, peftkern::Workspace::bytes, peftkern::split_dropout,
    peftkern::scale_columns, peftkern::sum_rows};

extern "C" const peftkern::PrefixKernels peftkern_prefix_avx512bf16 = {peftkern::prefix_forward,
                                                                       peftkern::prefix_backward, peftkern::sum_parts};
