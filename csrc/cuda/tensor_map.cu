#include "cuda/tensor_map.h"

#include <cuda_runtime.h>

namespace peftkern {
namespace {

struct BoxedMatrix {
    CUtensorMapDataType type;
    const void* data;
    int64_t rows, columns, pitch_bytes;  // columns in elements
    int box_rows, box_columns;
    CUtensorMapSwizzle swizzle;
};

int encode(CUtensorMap* map, const BoxedMatrix& matrix) {
    // Through the runtime, so that the library loads where there is no driver. The runtime keeps what it found.
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    if (error != cudaSuccess) return cudaGetLastError(), error;
    if (status != cudaDriverEntryPointSuccess || !found) return cudaErrorNotSupported;
    const auto encode_tiled = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);

    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
    const cuuint64_t pitches[1] = {static_cast<cuuint64_t>(matrix.pitch_bytes)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(matrix.box_columns), static_cast<cuuint32_t>(matrix.box_rows)};
    const cuuint32_t strides[2] = {1, 1};
    const CUresult result = encode_tiled(map, matrix.type, 2, const_cast<void*>(matrix.data), sizes, pitches, box,
                                         strides, CU_TENSOR_MAP_INTERLEAVE_NONE, matrix.swizzle,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

int encode_tokens(CUtensorMap* map, const CudaLinear& linear, int64_t depth, int tokens) {
    const auto type =
        linear.dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return encode(map,
                  {type, linear.x, linear.rows, depth, linear.x_stride * 2, tokens, 64, CU_TENSOR_MAP_SWIZZLE_128B});
}

int encode_codes(CUtensorMap* map, const CudaLinear& linear, int rows, int bytes) {
    const int64_t row_bytes = linear.in_features / 2;
    return encode(map, {CU_TENSOR_MAP_DATA_TYPE_UINT8, linear.weight.codes, linear.out_features, row_bytes, row_bytes,
                        rows, bytes, bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B});
}

}  // namespace peftkern
