// NF4 quantisation and dequantisation on the CPU: what a host function hands to the kernels of an instruction set.
// Plain structs only: the instruction-set files include this header and nothing of torch or of the standard library.
#pragma once

#include <stdint.h>

#include "common/nf4_format.h"
#include "cpu/gemm.h"

namespace peftkern {

struct Quantize {
    const void* weight;  // [numel]
    Dtype dtype;
    int64_t numel;
    int64_t block_size;
    uint8_t* codes;  // [ceil(numel / 2)]
    float* absmax;   // [ceil(numel / block_size)]; NaN or infinity where the block has one
};

// absmax - offset, scaled to [-1, 1], is rounded to a grid of 65536 points and then to the nearest value of a 256-entry
// map: bitsandbytes' CPU quantiser, whose bytes differ from the nearest value's in 1 of 1000.
struct QuantizeAbsmax {
    const float* absmax;  // [count]
    int64_t count;
    float offset;
    const uint8_t* byte_of_grid;  // [kGridSize]
    uint8_t* bytes;               // [count]
    float* nested_absmax;         // [ceil(count / kNestedBlockSize)]
};

struct Dequantize {
    Nf4 weight;
    int64_t numel;
    void* out;  // [numel]
    Dtype dtype;
};

// Each computes the blocks [begin, end); a block's result does not depend on how the blocks are shared out.
struct QuantizeKernels {
    void (*quantize)(const Quantize* task, int64_t begin, int64_t end);
    void (*quantize_absmax)(const QuantizeAbsmax* task, int64_t begin, int64_t end);
    void (*dequantize)(const Dequantize* task, int64_t begin, int64_t end);
};

extern "C" {
PEFTKERN_KERNELS QuantizeKernels peftkern_quantize_scalar, peftkern_quantize_avx2, peftkern_quantize_avx512;
}

}  // namespace peftkern
