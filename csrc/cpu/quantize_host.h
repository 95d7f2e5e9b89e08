// What the host functions of nf4_quantize and nf4_dequantize share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "cpu/isa.h"
#include "cpu/quantize.h"

namespace peftkern {

inline const QuantizeKernels& quantize_kernels(const char* op) {
    // AVX-512-BF16 adds dot products, which nothing here uses.
    static const QuantizeKernels* const kernels[kIsaCount] = {&peftkern_quantize_scalar, &peftkern_quantize_avx2,
                                                              &peftkern_quantize_avx512, &peftkern_quantize_avx512};
    std::string error;
    const Isa isa = current_isa(&error);
    PEFTKERN_CHECK(error.empty(), op, ": ", error);
    return *kernels[static_cast<int>(isa)];
}

inline int64_t ceil_divide(int64_t n, int64_t d) {
    return (n + d - 1) / d;
}

// Blocks that make a thread's work (64 Ki elements) worth waking it.
inline int64_t blocks_per_thread(int64_t block_size) {
    return 65536 / block_size;
}

}  // namespace peftkern
