// h = x A^T in fp32 for a few rows of x: what lora_linear launches before its decode. It lets the decode kernel start
// at once, which needs h only at its end.
#include "cuda/launch.h"
#include "cuda/nf4_decode_maps.h"
#include "cuda/ptx.h"

namespace peftkern {
namespace {

constexpr int kThreads = 512;
constexpr int kLanes = 32;
constexpr int kStep = 8;

// Eight elements as they lie in memory: 16 bytes, or 32 of fp32.
template <Dtype kDtype>
struct Step {
    static constexpr int kPieces = kDtype == Dtype::kFloat32 ? 2 : 1;
    uint4 pieces[kPieces];

    __device__ void load(const void* data, int64_t i) {
        const auto* from = reinterpret_cast<const uint4*>(static_cast<const char*>(data) + i * 2 * kPieces);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) pieces[piece] = __ldg(from + piece);
    }
    __device__ float operator[](int e) const {
        const uint4& piece = pieces[e / (kStep / kPieces)];
        const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
        if constexpr (kDtype == Dtype::kFloat32)
            return float_of_bits(words[e % 4]);
        else
            return float_of_half<kDtype>(words[e / 2] >> (e % 2 * 16) & 0xffff);
    }
};

// A CTA makes one column of h: lora_a is read once. Rows of x behind the last are the last, and are not stored, so that
// no load waits for a branch.
template <Dtype kDtype, Dtype kAdapter, int kRows>
__global__ void __launch_bounds__(kThreads) lora_down(const CudaLoraDown task) {
    __shared__ float of_warps[kThreads / kLanes][kRows];
    let_next_kernel_start();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
    const int64_t r = blockIdx.x;
    float sums[kRows] = {};
#pragma unroll 1
    for (int64_t first = int64_t{thread} * kStep; first < task.in_features; first += kThreads * kStep) {
        Step<kAdapter> a;
        Step<kDtype> x[kRows];
        a.load(task.lora_a, r * task.in_features + first);
#pragma unroll
        for (int row = 0; row < kRows; ++row)
            x[row].load(task.x, min(int64_t{row}, task.rows - 1) * task.x_stride + first);
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
            for (int e = 0; e < kStep; ++e) sums[row] += a[e] * x[row][e];
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
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

template <Dtype kDtype, Dtype kAdapter>
cudaError_t launch_rows(const CudaLoraDown& task, void* stream) {
    const LaunchShape shape{dim3(static_cast<unsigned>(task.rank)), dim3(kThreads), 0, stream_of(stream)};
    if (task.rows == 1) return launch<lora_down<kDtype, kAdapter, 1>>(shape, task);
    return task.rows <= 4 ? launch<lora_down<kDtype, kAdapter, 4>>(shape, task)
                          : launch<lora_down<kDtype, kAdapter, 8>>(shape, task);
}

template <Dtype kDtype>
cudaError_t launch_dtype(const CudaLoraDown& task, void* stream) {
    return task.lora_a_dtype == Dtype::kFloat32 ? launch_rows<kDtype, Dtype::kFloat32>(task, stream)
                                                : launch_rows<kDtype, kDtype>(task, stream);
}

}  // namespace
}  // namespace peftkern

int peftkern::peftkern_cuda_lora_down(const CudaLoraDown* task, void* stream) {
    if (task->rows == 0 || task->rank == 0) return cudaSuccess;
    if (task->rows > kDecodeRows) return cudaErrorInvalidValue;
    const bool known = task->lora_a_dtype == Dtype::kFloat32 || task->lora_a_dtype == task->dtype;
    if (task->dtype == Dtype::kFloat32 || !known) return cudaErrorInvalidValue;
    return task->dtype == Dtype::kBFloat16 ? launch_dtype<Dtype::kBFloat16>(*task, stream)
                                           : launch_dtype<Dtype::kFloat16>(*task, stream);
}
