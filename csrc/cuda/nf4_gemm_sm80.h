// What the two mma.sync kernels share: the ring of stages that cp.async fills, and its launch.
#pragma once

#include "cuda/mma_sm80.h"
#include "cuda/nf4_gemm_device.h"
#include "cuda/nf4_gemm_launch.h"
#include "cuda/ptx.h"

namespace peftkern {

// Calls multiply(stage) for every step of the tile, in order. The first stages are on their way while fill_table()
// writes the look-up table; scales are `scale_factor` times the weight's. Afterwards nothing is in flight.
template <class Shape, int kTokens, class FillTable, class Multiply>
__device__ __forceinline__ void run_ring(const CudaGemm& gemm, const Tile& tile, int stage_count, float scale_factor,
                                         unsigned char* shared, FillTable&& fill_table, Multiply&& multiply) {
    float* map = reinterpret_cast<float*>(shared + kMapOffset);
    unsigned char* stages = shared + kStagesOffsetSm80;
    constexpr int kStageBytes = Shape::template kBytes<kTokens>;
    const ScaleReader reader(gemm.linear.weight, map, scale_factor);
    Loader<Shape, kTokens> loader(gemm.linear, tile, threadIdx.x);
    const auto copy = [&](int slot) {
        const uint32_t stage = shared_address(stages) + slot * kStageBytes;
        loader.next([&](int to, const void* from, bool valid) { copy_async(stage + to, from, valid); });
    };
    const auto store_scale = [&](int slot, RawScale raw) {
        float* scales = reinterpret_cast<float*>(stages + slot * kStageBytes + Shape::template kScalesAt<kTokens>);
        scales[threadIdx.x] = reader.decode(raw);
    };

    RawScale first_scales[kMostStagesSm80 - 1];
#pragma unroll
    for (int i = 0; i < kMostStagesSm80 - 1; ++i) {
        first_scales[i] = reader.fetch(loader.scale(tile.step_begin + i));
        if (i >= stage_count - 1) continue;
        if (i < tile.steps) copy(i);
        commit_copies();
    }
    RawScale ahead = reader.fetch(loader.scale(tile.step_begin + stage_count - 1));
    fill_map(map, gemm.linear.weight, threadIdx.x, kThreadsSm80);
    fill_table();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMostStagesSm80 - 1; ++i)
        if (i < stage_count - 1) store_scale(i, first_scales[i]);

    int slot = 0, fill = stage_count - 1;
#pragma unroll 1
    for (int step = 0; step < tile.steps; ++step) {
        wait_for_stage(stage_count);
        __syncthreads();
        if (step + stage_count - 1 < tile.steps) {
            copy(fill);
            store_scale(fill, ahead);
        }
        commit_copies();
        ahead = reader.fetch(loader.scale(tile.step_begin + step + stage_count));
        multiply(stages + slot * kStageBytes);
        slot = slot + 1 == stage_count ? 0 : slot + 1;
        fill = fill + 1 == stage_count ? 0 : fill + 1;
    }
    wait_copies<0>();
}

template <class Shape, int kTokens, auto kernel>
int launch_ring(const CudaGemm& gemm, const DeviceTraits& traits, int device, void* stream) {
    constexpr int kStageBytes = Shape::template kBytes<kTokens>;
    const int stages = stages_that_fit(traits, kStageBytes);
    if (stages < 2) return cudaErrorInvalidConfiguration;
    return launch_tiles<kernel>(gemm, columns_of<Shape>(gemm.linear), Shape::kTile, kThreadsSm80,
                                kStagesOffsetSm80 + stages * kStageBytes, device, stream, gemm, stages);
}

}  // namespace peftkern
