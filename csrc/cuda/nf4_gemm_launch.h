// What the launchers of the NF4 GEMMs share.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/nf4_gemm.h"
#include "cuda/nf4_gemm_maps.h"

namespace peftkern {

// `kernel` over a plan's tiles and slices of a result of `columns`, then the sum of the slices.
template <auto kernel, class... Arguments>
int launch_tiles(const CudaGemm& gemm, int64_t columns, int tile_columns, int threads, int shared_bytes, int device,
                 void* stream, Arguments&&... arguments) {
    const CudaLinear& linear = gemm.linear;
    if (const cudaError_t error = opt_in_shared<kernel>(device, shared_bytes)) return error;
    const int64_t tiles = ceil_divide(linear.rows, gemm.plan.tokens) * ceil_divide(columns, tile_columns);
    if (tiles > kMostBlocks || linear.splits != gemm.plan.slices) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(gemm.plan.slices));
    const cudaError_t error =
        launch<kernel>({grid, dim3(threads), shared_bytes, stream_of(stream)}, std::forward<Arguments>(arguments)...);
    if (error != cudaSuccess || linear.splits == 1) return error;
    const CudaSplitSum sum{linear.partials, linear.splits, linear.rows, columns,
                           linear.epilogue, linear.y,      linear.dtype};
    return peftkern_cuda_split_sum(&sum, stream);
}

// The deepest ring of the cp.async kernels that a block's shared memory holds.
constexpr int kMostStagesSm80 = 4;
inline int stages_that_fit(const DeviceTraits& traits, int stage_bytes) {
    const int fitting = (traits.shared_bytes - kStagesOffsetSm80) / stage_bytes;
    return fitting < kMostStagesSm80 ? fitting : kMostStagesSm80;
}

// Calls tile<kTokens>() for the plan's tile, one of `kTiles`.
template <int... kTiles, class Tile>
int for_tile(int tokens, Tile&& tile) {
    int result = cudaErrorInvalidValue;
    ((tokens == kTiles ? void(result = tile(std::integral_constant<int, kTiles>())) : void()), ...);
    return result;
}

}  // namespace peftkern
