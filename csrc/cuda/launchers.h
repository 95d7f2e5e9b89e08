// The launchers of csrc/cuda/*.cu, as the host functions call them: raw pointers, sizes and a stream; no torch, no CUDA
// header. Each checks its launches and returns a cudaError_t as an int, 0 for success; none allocates or synchronises.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "cuda/epilogue.h"
#include "cuda/nf4_maps.h"

namespace peftkern {

// What the rules of dispatch.h and the launchers ask of a device, read once.
struct DeviceTraits {
    int compute_capability;  // 90 for 9.0
    int sm_count;
    int shared_bytes;  // that a block may opt in to
    int64_t l2_bytes;
    int clock_khz, memory_clock_khz;  // 0 where the driver does not tell
    int bus_bits;
};

struct CudaQuantize {
    const void* weight;  // [numel]
    Dtype dtype;
    int64_t numel;
    int block_shift;
    uint8_t* codes;  // [ceil(numel / 2)]
    float* absmax;   // [ceil(numel / block size)]; NaN or infinity where the block has one
};

struct CudaQuantizeAbsmax {
    const float* absmax;  // [count]
    int64_t count;
    const float* quant_map;  // [256], ascending
    const float* offset;     // one value
    uint8_t* bytes;          // [count]
    float* nested_absmax;    // [ceil(count / 256)]
};

struct CudaDequantize {
    Nf4View weight;
    int64_t numel;
    void* out;  // [numel], 16-byte aligned
    Dtype dtype;
};

// y = epilogue(x W^T). The fused kernels take bf16 and fp16, in_features % 64 == 0, block_size >= 64 that divides
// in_features, x and the codes 16-byte aligned, x_stride % 8 == 0.
struct CudaLinear {
    const void* x;  // [rows, in_features], rows x_stride elements apart
    int64_t x_stride, rows, in_features, out_features;
    Dtype dtype;  // of x and y
    Nf4View weight;
    Epilogue epilogue;
    void* y;          // [rows, out_features], dense
    int splits;       // parts of the contraction; the launcher adds them by peftkern_cuda_split_sum
    float* partials;  // [splits, rows, out_features] where splits > 1
};

// h = x lora_a^T in fp32: at most 8 rows of bf16 or fp16, in_features % 8 == 0, both 16-byte aligned.
struct CudaLoraDown {
    const void* x;  // [rows, in_features], rows x_stride elements apart
    int64_t x_stride, rows, in_features;
    Dtype dtype;
    const void* lora_a;  // [rank, in_features]
    Dtype lora_a_dtype;  // fp32 or x's
    int rank;
    float* h;  // [rows, rank]
};

// y = epilogue(sum of partials), in bf16 or fp16.
struct CudaSplitSum {
    const float* partials;  // [splits, rows, columns]
    int splits;
    int64_t rows, columns;
    Epilogue epilogue;
    void* y;  // [rows, columns]
    Dtype dtype;
};

struct DecodePlan;

extern "C" {
const char* peftkern_cuda_error_text(int error);
int peftkern_cuda_traits(int device, DeviceTraits* traits);
int peftkern_cuda_nf4_quantize(const CudaQuantize* task, void* stream);
int peftkern_cuda_nf4_quantize_absmax(const CudaQuantizeAbsmax* task, void* stream);
int peftkern_cuda_nf4_dequantize(const CudaDequantize* task, void* stream);
int peftkern_cuda_nf4_linear_decode(const CudaLinear* task, const DecodePlan* plan, int device, void* stream);
int peftkern_cuda_lora_down(const CudaLoraDown* task, void* stream);
int peftkern_cuda_split_sum(const CudaSplitSum* task, void* stream);
}

}  // namespace peftkern
