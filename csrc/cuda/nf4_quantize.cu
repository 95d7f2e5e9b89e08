// nf4_quantize and nf4_quantize_absmax on CUDA devices; the bytes are those of the CPU's kernels.
#include "cuda/launch.h"

namespace peftkern {
namespace {

// A thread takes 8 neighbours, from 16-byte loads to a 4-byte store; a CTA takes the elements of the largest block.
constexpr int kStep = 8;
constexpr int kThreads = kMaxBlockSize / kStep;
constexpr int kLanes = 32;

// Each lane has its own copy of the cells, in its own banks.
struct Cell {
    float midpoint;
    uint32_t first_code;
};

// The step at e, zeros behind the end.
template <Dtype kDtype>
__device__ __forceinline__ void load_step(const CudaQuantize& task, int64_t e, bool vectors, float (&values)[kStep]) {
    if (!vectors || e + kStep > task.numel) {
#pragma unroll
        for (int i = 0; i < kStep; ++i)
            values[i] = e + i < task.numel ? load_element(task.weight, kDtype, e + i) : 0.0f;
    } else if constexpr (kDtype == Dtype::kFloat32) {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(task.weight) + e);
        const float4 low = __ldcs(from), high = __ldcs(from + 1);
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
        const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(task.weight) + e);
        const uint4 packed = __ldcs(from);
        const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int i = 0; i < kStep; ++i) values[i] = float_of_half<kDtype>(words[i / 2] >> (i % 2 * 16) & 0xffff);
    }
}

// The largest of `group` neighbouring threads, a power of two.
__device__ __forceinline__ uint32_t max_of_group(uint32_t value, int group, uint32_t* of_warps) {
    for (int distance = min(group, kLanes) / 2; distance > 0; distance /= 2)
        value = max(value, __shfl_xor_sync(~0u, value, distance));
    if (group <= kLanes) return value;
    const int warp = static_cast<int>(threadIdx.x) / kLanes, warps = group / kLanes;
    if (threadIdx.x % kLanes == 0) of_warps[warp] = value;
    __syncthreads();
    const int first = warp / warps * warps;
    for (int i = first; i < first + warps; ++i) value = max(value, of_warps[i]);
    return value;
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) nf4_quantize(const CudaQuantize task, bool vectors) {
    __shared__ Cell cells[kNearestCells][kLanes];
    __shared__ uint32_t of_warps[kThreads / kLanes];
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
    const int64_t e = int64_t{blockIdx.x} * kMaxBlockSize + thread * kStep;
    float values[kStep];
    load_step<kDtype>(task, e, vectors, values);
#pragma unroll
    for (int i = 0; i < kNearestCells * kLanes; i += kThreads) {
        const int cell = (i + thread) / kLanes;
        cells[cell][lane] = {nf4_tables().cell_midpoint[cell], nf4_tables().cell_code[cell]};
    }

    // Bits of |x| are ordered as |x| is, with infinity and NaN above every number.
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kStep; ++i) most = max(most, bits_of_float(values[i]) & 0x7fffffff);
    const float largest = float_of_bits(max_of_group(most, 1 << task.block_shift >> 3, of_warps));
    __syncthreads();
    if (e >= task.numel) return;

    // A last block that the end of the weight cuts short is divided, and its absmax is never below kMinAbsmax.
    const int64_t block = block_of(e, task.block_shift), block_end = (block + 1) << task.block_shift;
    const bool whole = block_end <= task.numel;
    const float divisor = largest < kMinAbsmax ? kMinAbsmax : largest, inverse = 1.0f / divisor;
    if (e == block << task.block_shift) task.absmax[block] = whole ? largest : divisor;
#pragma unroll
    for (int i = 0; i < kStep; ++i) values[i] *= whole ? inverse : 1.0f;
    if (!whole) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) values[i] /= divisor;
    }
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
        const Cell cell = cells[nearest_cell(values[i])][lane];
        word |= code_in_cell(values[i], cell.midpoint, cell.first_code) << shift_in_word(i);
    }
    if (e + kStep <= task.numel) {
        *reinterpret_cast<uint32_t*>(task.codes + byte_of(e)) = word;
    } else {
        for (int i = 0; e + i < task.numel; i += 2) task.codes[byte_of(e + i)] = static_cast<uint8_t>(word >> 4 * i);
    }
}

__global__ void __launch_bounds__(kNestedBlockSize) nf4_quantize_absmax(const CudaQuantizeAbsmax task) {
    __shared__ float map[kNestedMapSize];
    __shared__ uint32_t of_warps[kNestedBlockSize / kLanes];
    const int64_t i = int64_t{blockIdx.x} * kNestedBlockSize + threadIdx.x;
    map[threadIdx.x] = task.quant_map[threadIdx.x];
    const float difference = i < task.count ? task.absmax[i] - *task.offset : 0.0f;
    const uint32_t bits = bits_of_float(difference) & 0x7fffffff;
    const float largest = float_of_bits(max_of_group(bits, kNestedBlockSize, of_warps));
    if (threadIdx.x == 0) task.nested_absmax[blockIdx.x] = largest;
    if (i >= task.count) return;
    const float inverse = 1.0f / (largest < kMinNestedAbsmax ? kMinNestedAbsmax : largest);
    const int position = grid_position(__fmul_rn(difference, inverse));
    const int byte = largest == 0.0f ? 0 : nearest_of_map(map, grid_value(position));
    task.bytes[i] = static_cast<uint8_t>(byte);
}

template <Dtype kDtype>
cudaError_t launch_dtype(const CudaQuantize& task, cudaStream_t stream) {
    const int64_t ctas = ceil_divide(task.numel, kMaxBlockSize);
    if (ctas > kMostBlocks) return cudaErrorInvalidValue;
    const bool vectors = reinterpret_cast<uintptr_t>(task.weight) % 16 == 0;
    return launch<nf4_quantize<kDtype>>({dim3(static_cast<unsigned>(ctas)), dim3(kThreads), 0, stream}, task, vectors);
}

}  // namespace
}  // namespace peftkern

int peftkern::peftkern_cuda_nf4_quantize(const CudaQuantize* task, void* stream) {
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

int peftkern::peftkern_cuda_nf4_quantize_absmax(const CudaQuantizeAbsmax* task, void* stream) {
    if (task->count == 0) return cudaSuccess;
    const int64_t ctas = ceil_divide(task->count, kNestedBlockSize);
    if (ctas > kMostBlocks) return cudaErrorInvalidValue;
    const LaunchShape shape{dim3(static_cast<unsigned>(ctas)), dim3(kNestedBlockSize), 0, stream_of(stream)};
    return launch<nf4_quantize_absmax>(shape, *task);
}
