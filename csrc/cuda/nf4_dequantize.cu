// nf4_dequantize on CUDA devices: one launch, scales flat or nested. Bound by its writes.
#include "cuda/launch.h"

namespace peftkern {
namespace {

constexpr int kThreads = 256;
// A thread makes 8 neighbours, from a 4-byte load to 16-byte stores, so that a warp's loads and stores are contiguous;
// kSteps of them are in flight at once.
constexpr int kStep = 8;
constexpr int kSteps = 4;
constexpr int kTile = kThreads * kStep * kSteps;
// Each lane has its own copy of the table: 16 entries in its own bank.
constexpr int kLanes = 32;

template <Dtype kDtype>
__device__ __forceinline__ void store_step(void* out, int64_t e, const float (&values)[kStep]) {
    if constexpr (kDtype == Dtype::kFloat32) {
        float4* to = reinterpret_cast<float4*>(static_cast<float*>(out) + e);
        to[0] = make_float4(values[0], values[1], values[2], values[3]);
        to[1] = make_float4(values[4], values[5], values[6], values[7]);
    } else {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + e) =
            make_uint4(pack_halves<kDtype>(values[0], values[1]), pack_halves<kDtype>(values[2], values[3]),
                       pack_halves<kDtype>(values[4], values[5]), pack_halves<kDtype>(values[6], values[7]));
    }
}

// The few elements behind the last whole step.
template <Dtype kDtype, bool kNested>
__device__ void store_rest(const CudaDequantize& task, int64_t first, const float* map, float offset) {
#pragma unroll 1
    for (int64_t e = first; e < task.numel; ++e) {
        const float scale = block_scale<kNested>(task.weight, block_of(e, task.weight.block_shift), map, offset);
        const int code = code_in(task.weight.codes[byte_of(e)], e);
        store_element(task.out, kDtype, e, nf4_tables().fp32[code] * scale);
    }
}

// Tiles begin at a block, and a step never crosses one: blocks have 32 to 4096 elements.
template <Dtype kDtype, bool kNested>
__global__ void __launch_bounds__(kThreads) nf4_dequantize(const CudaDequantize task) {
    __shared__ float table[16 * kLanes];
    __shared__ float map[kNested ? kNestedMapSize : 1];
    const unsigned thread = threadIdx.x;
    const int64_t tile = int64_t{blockIdx.x} * kTile, rest = task.numel - tile;
    const unsigned whole = static_cast<unsigned>(rest < kTile ? rest / kStep : kTile / kStep);  // steps that are there

    // From the tile's first element and block on, 32-bit offsets do.
    const int64_t first_block = block_of(tile, task.weight.block_shift);
    const auto* words = reinterpret_cast<const uint32_t*>(task.weight.codes + byte_of(tile));
    const auto* bytes = static_cast<const uint8_t*>(task.weight.absmax) + first_block;
    const auto* flat = static_cast<const float*>(task.weight.absmax) + first_block;
    const float* nested_absmax = task.weight.nested_absmax + (first_block >> kNestedBlockShift);
    const unsigned in_nested_block = static_cast<unsigned>(first_block) & ((1u << kNestedBlockShift) - 1);
    uint32_t codes[kSteps];
    float factor[kSteps];
    uint8_t byte[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const unsigned step = i * kThreads + thread, block = step * kStep >> task.weight.block_shift;
        if (step >= whole) continue;
        codes[i] = __ldcs(words + step);
        if constexpr (kNested) {
            byte[i] = __ldg(bytes + block);
            factor[i] = __ldg(nested_absmax + ((in_nested_block + block) >> kNestedBlockShift));
        } else {
            factor[i] = __ldg(flat + block);
        }
    }
    float offset = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < 16 * kLanes; i += kThreads) table[i + thread] = nf4_tables().fp32[(i + thread) / kLanes];
    if constexpr (kNested) {
        static_assert(kThreads == kNestedMapSize, "a thread copies one entry");
        map[thread] = __ldg(task.weight.nested_quant_map + thread);
        offset = __ldg(task.weight.offset);
    }
    __syncthreads();

    const uint32_t lane_offset = thread % kLanes * uint32_t{sizeof(float)};
    const auto value_of = [&](uint32_t word, int e) {
        const uint32_t at = lane_table_address(word, e, lane_offset);
        return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + at);
    };
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const unsigned step = i * kThreads + thread;
        if (step >= whole) continue;
        const float scale = kNested ? nested_scale(map[byte[i]], factor[i], offset) : factor[i];
        float values[kStep];
#pragma unroll
        for (int e = 0; e < kStep; ++e) values[e] = value_of(codes[i], e) * scale;
        store_step<kDtype>(task.out, tile + step * kStep, values);
    }
    if (rest < kTile && thread == 0) store_rest<kDtype, kNested>(task, tile + int64_t{whole} * kStep, map, offset);
}

template <Dtype kDtype>
cudaError_t launch_dtype(const CudaDequantize& task, cudaStream_t stream) {
    const int64_t blocks = ceil_divide(task.numel, kTile);
    if (blocks > kMostBlocks) return cudaErrorInvalidValue;
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream};
    return task.weight.nested_absmax ? launch<nf4_dequantize<kDtype, true>>(shape, task)
                                     : launch<nf4_dequantize<kDtype, false>>(shape, task);
}

}  // namespace
}  // namespace peftkern

int peftkern::peftkern_cuda_nf4_dequantize(const CudaDequantize* task, void* stream) {
    if (task->numel == 0) return cudaSuccess;
    switch (task->dtype) {
        case Dtype::kFloat32:
            return launch_dtype<Dtype::kFloat32>(*task, stream_of(stream));
        case Dtype::kBFloat16:
            return launch_dtype<Dtype::kBFloat16>(*task, stream_of(stream));
        default:
            return launch_dtype<Dtype::kFloat16>(*task, stream_of(stream));
    }
}
