// The second stage of a contraction that ran in parts: adds the parts in their order, then the epilogue, one rounding.
#include "cuda/launch.h"

namespace peftkern {
namespace {

constexpr int kThreads = 128;

// A thread makes kColumns neighbours of a row: 4, or 1 where the rows of y do not start at multiples of 4.
template <Dtype kDtype, int kColumns>
__global__ void __launch_bounds__(kThreads) split_sum(const CudaSplitSum task) {
    const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kColumns, numel = task.rows * task.columns;
    if (i >= numel) return;
    float sums[kColumns] = {};
    for (int split = 0; split < task.splits; ++split) {
        const float* part = task.partials + split * numel + i;
        if constexpr (kColumns == 4) {
            const float4 values = *reinterpret_cast<const float4*>(part);
            sums[0] += values.x, sums[1] += values.y, sums[2] += values.z, sums[3] += values.w;
        } else {
            sums[0] += *part;
        }
    }
    const int64_t row = i / task.columns, column = i - row * task.columns;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c] = finish(task.epilogue, sums[c], row, column + c);
    uint16_t* y = static_cast<uint16_t*>(task.y) + i;
    if constexpr (kColumns == 4) {
        *reinterpret_cast<uint2*>(y) =
            make_uint2(pack_halves<kDtype>(sums[0], sums[1]), pack_halves<kDtype>(sums[2], sums[3]));
    } else {
        *y = half_of_float<kDtype>(sums[0]);
    }
}

template <Dtype kDtype, int kColumns>
cudaError_t launch_columns(const CudaSplitSum& task, cudaStream_t stream) {
    const int64_t blocks = ceil_divide(task.rows * task.columns, int64_t{kThreads} * kColumns);
    if (blocks > kMostBlocks) return cudaErrorInvalidValue;
    return launch<split_sum<kDtype, kColumns>>({dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream}, task);
}

template <Dtype kDtype>
cudaError_t launch_dtype(const CudaSplitSum& task, cudaStream_t stream) {
    return task.columns % 4 == 0 ? launch_columns<kDtype, 4>(task, stream) : launch_columns<kDtype, 1>(task, stream);
}

}  // namespace
}  // namespace peftkern

int peftkern::peftkern_cuda_split_sum(const CudaSplitSum* task, void* stream) {
    if (task->rows == 0 || task->columns == 0) return cudaSuccess;
    switch (task->dtype) {
        case Dtype::kBFloat16:
            return launch_dtype<Dtype::kBFloat16>(*task, stream_of(stream));
        case Dtype::kFloat16:
            return launch_dtype<Dtype::kFloat16>(*task, stream_of(stream));
        default:
            return cudaErrorInvalidValue;
    }
}
