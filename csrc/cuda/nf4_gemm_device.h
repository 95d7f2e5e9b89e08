// What the NF4 GEMM kernels share on the device: scales and stores.
#pragma once

#include "cuda/nf4_gemm.h"
#include "cuda/nf4_gemm_load.h"

namespace peftkern {

template <class Shape, int kTokens>
__device__ __forceinline__ Tile tile_of_block(const CudaGemm& gemm) {
    const CudaLinear& linear = gemm.linear;
    return tile_of(blockIdx.x, blockIdx.y, kTokens, Shape::kTile, steps_of(linear.rows, kTokens),
                   static_cast<int>(steps_of(depth_of<Shape>(linear), Shape::kStep)), gemm.plan.slice_steps);
}

// A scale as it lies in memory: read early, combined late.
struct RawScale {
    float value;
    uint8_t byte;
};

struct ScaleReader {
    const Nf4View& weight;
    const float* map;  // shared
    float factor;
    float offset;

    __device__ ScaleReader(const Nf4View& weight, const float* map, float factor)
        : weight(weight), map(map), factor(factor), offset(weight.nested_absmax ? __ldg(weight.offset) : 0.0f) {}

    __device__ RawScale fetch(ScalePlace place) const {
        RawScale raw{0.0f, 0};
        if (!place.valid) return raw;
        if (!weight.nested_absmax) {
            raw.value = __ldg(static_cast<const float*>(weight.absmax) + place.block);
        } else {
            raw.byte = __ldg(static_cast<const uint8_t*>(weight.absmax) + place.block);
            raw.value = __ldg(weight.nested_absmax + (place.block >> kNestedBlockShift));
        }
        return raw;
    }

    // A scale that is not there decodes to 0, or the offset: its rows and columns meet zeros or are never stored.
    __device__ float decode(RawScale raw) const {
        return (weight.nested_absmax ? nested_scale(map[raw.byte], raw.value, offset) : raw.value) * factor;
    }
};

__device__ __forceinline__ void fill_map(float* map, const Nf4View& weight, int thread, int threads) {
    if (!weight.nested_absmax) return;
    for (int i = thread; i < kNestedMapSize; i += threads) map[i] = __ldg(weight.nested_quant_map + i);
}

// Four neighbours of one row of the result, from `column`: to the partials of a slice, or through the epilogue to y.
// `pitch` is y's row length; kWhole promises a multiple of 4, kEpilogue that there may be one.
template <Dtype kDtype, bool kWhole, bool kEpilogue>
__device__ __forceinline__ void store_four(const CudaLinear& linear, int slice, int64_t row, int64_t column,
                                           int64_t pitch, float (&values)[4]) {
    const int64_t at = row * pitch + column;
    const bool whole = kWhole || (pitch & 3) == 0;
    if (linear.splits > 1) {
        float* to = linear.partials + slice * linear.rows * pitch + at;
        if (whole) {
            *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
        } else {
            for (int i = 0; i < 4 && column + i < pitch; ++i) to[i] = values[i];
        }
        return;
    }
    if (kEpilogue) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (whole || column + i < pitch) values[i] = finish(linear.epilogue, values[i], row, column + i);
    }
    uint16_t* to = static_cast<uint16_t*>(linear.y) + at;
    if (whole) {
        *reinterpret_cast<uint2*>(to) =
            make_uint2(pack_halves<kDtype>(values[0], values[1]), pack_halves<kDtype>(values[2], values[3]));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (column + i < pitch) to[i] = half_of_float<kDtype>(values[i]);
    }
}

}  // namespace peftkern
