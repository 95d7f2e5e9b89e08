// TMA's descriptions on the host: what cuTensorMapEncodeTiled is given, checked as the driver API's manual says.
#pragma once

#include <cuda_runtime.h>

using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_INVALID_CONTEXT = 201 };
enum CUtensorMapDataType {
    CU_TENSOR_MAP_DATA_TYPE_UINT8,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
};
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_64B = 64, CU_TENSOR_MAP_SWIZZLE_128B = 128 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
    const unsigned char* data;
    uint64_t row_bytes, rows, pitch;
    uint32_t element, box_bytes, box_rows, swizzle;
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* pitches, const cuuint32_t* box,
                                       const cuuint32_t* strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    if (!emulation::has_context) return CUDA_ERROR_INVALID_CONTEXT;
    const uint32_t element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
    *map = {static_cast<const unsigned char*>(data),
            sizes[0] * element,
            sizes[1],
            pitches[0],
            element,
            box[0] * element,
            box[1],
            static_cast<uint32_t>(swizzle)};
    const bool right = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitches[0] % 16 == 0 &&
                       pitches[0] >= map->row_bytes && sizes[0] > 0 && sizes[1] > 0 && box[0] <= 256 && box[1] <= 256 &&
                       map->box_bytes % 16 == 0 && map->box_bytes <= map->swizzle && strides[0] == 1 && strides[1] == 1;
    return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* status) {
    *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
    *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
