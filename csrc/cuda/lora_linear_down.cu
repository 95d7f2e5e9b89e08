// h = x A^T in fp32 for a few rows of x: what lora_linear launches before its decode. It lets the decode kernel start
// at once, which needs h only at its end.
#include "cuda/launch.h"
#include "cuda/nf4_decode_maps.h"
#include "cuda/ptx.h"

namespace peftkern {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kStep = 8;

template <Dtype kDtype>
__device__ __forceinline__ void load_step(const void* data, int64_t i, float (&values)[kStep]) {
    if constexpr (kDtype == Dtype::kFloat32) {
        const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
        const float4 low = __ldg(from), high = __ldg(from + 1);
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
        const uint4 packed = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + i));
        const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int e = 0; e < kStep; ++e) values[e] = float_of_half<kDtype>(words[e / 2] >> (e % 2 * 16) & 0xffff);
    }
}

// A CTA makes one column of h: lora_a is read once.
template <Dtype kDtype, Dtype kAdapter>
__global__ void __launch_bounds__(kThreads) lora_down(const CudaLoraDown task) {
    __shared__ float of_warps[kThreads / kLanes][kDecodeRows];
    let_next_kernel_start();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
    const int64_t r = blockIdx.x;
    float sums[kDecodeRows] = {};
#pragma unroll 1
    for (int64_t first = int64_t{thread} * kStep; first < task.in_features; first += kThreads * kStep) {
        float a[kStep], x[kStep];
        load_step<kAdapter>(task.lora_a, r * task.in_features + first, a);
#pragma unroll
        for (int row = 0; row < kDecodeRows; ++row) {
            if (row >= task.rows) continue;
            load_step<kDtype>(task.x, row * task.x_stride + first, x);
#pragma unroll
            for (int i = 0; i < kStep; ++i) sums[row] += a[i] * x[i];
        }
    }
#pragma unroll
    for (int row = 0; row < kDecodeRows; ++row) {
        for (int distance = kLanes / 2; distance > 0; distance /= 2)
            sums[row] += __shfl_xor_sync(~0u, sums[row], distance);
        if (lane == 0) of_warps[warp][row] = sums[row];
    }
    __syncthreads();
    if (thread >= task.rows) return;
    float sum = 0.0f;
    for (int w = 0; w < kThreads / kLanes; ++w) sum += of_warps[w][thread];
    task.h[thread * int64_t{task.rank} + r] = sum;
}

}  // namespace
}  // namespace peftkern

int peftkern::peftkern_cuda_lora_down(const CudaLoraDown* task, void* stream) {
    if (task->rows == 0 || task->rank == 0) return cudaSuccess;
    if (task->rows > kDecodeRows) return cudaErrorInvalidValue;
    const LaunchShape shape{dim3(static_cast<unsigned>(task->rank)), dim3(kThreads), 0, stream_of(stream)};
    const bool wide = task->lora_a_dtype == Dtype::kFloat32;
    if (task->dtype == Dtype::kFloat32 || !(wide || task->lora_a_dtype == task->dtype)) return cudaErrorInvalidValue;
    if (task->dtype == Dtype::kBFloat16)
        return wide ? launch<lora_down<Dtype::kBFloat16, Dtype::kFloat32>>(shape, *task)
                    : launch<lora_down<Dtype::kBFloat16, Dtype::kBFloat16>>(shape, *task);
    return wide ? launch<lora_down<Dtype::kFloat16, Dtype::kFloat32>>(shape, *task)
                : launch<lora_down<Dtype::kFloat16, Dtype::kFloat16>>(shape, *task);
}
