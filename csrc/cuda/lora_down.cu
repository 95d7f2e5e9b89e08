// h = x A^T in fp32 for a few rows of x: what a decode with an adapter launches first. It lets the decode kernel start
// at once, which needs h only at its end.
#include "cuda/launch.h"
#include "cuda/nf4_decode_maps.h"
#include "cuda/ptx.h"

namespace peftkern {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kStep = 8;

// A CTA makes one column of h: lora_a is read once.
template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) lora_down(const CudaLoraDown task) {
    __shared__ float of_warps[kThreads / kLanes][kDecodeRows];
    let_next_kernel_start();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
    const int64_t r = blockIdx.x;
    float sums[kDecodeRows] = {};
    for (int64_t first = int64_t{thread} * kStep; first < task.in_features; first += kThreads * kStep) {
        float a[kStep];
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            const bool there = first + i < task.in_features;
            a[i] = there ? load_element(task.lora_a, task.lora_a_dtype, r * task.in_features + first + i) : 0.0f;
        }
#pragma unroll
        for (int row = 0; row < kDecodeRows; ++row) {
            if (row >= task.rows) continue;
#pragma unroll
            for (int i = 0; i < kStep; ++i)
                if (first + i < task.in_features)
                    sums[row] += a[i] * load_element(task.x, kDtype, row * task.x_stride + first + i);
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
    switch (task->dtype) {
        case Dtype::kBFloat16:
            return launch<lora_down<Dtype::kBFloat16>>(shape, *task);
        case Dtype::kFloat16:
            return launch<lora_down<Dtype::kFloat16>>(shape, *task);
        default:
            return cudaErrorInvalidValue;
    }
}
