// The tile and the slices of an NF4 GEMM: a function of the shape and of the device's kind, so that a call gives the
// same bits whatever else runs.
#pragma once

#include "cuda/launchers.h"
#include "cuda/nf4_gemm_maps.h"

namespace peftkern {

struct GemmPlan {
    int tokens;       // of a tile
    int slices;       // of the contraction
    int slice_steps;  // steps of 128 of in (forward) or 64 of out (dX) in a slice
};

// A tile of tokens and the SM clocks in which it takes 1024 weights: the longest of their bytes (28 of H200's memory),
// the tensor core, shared memory and the issue of the kernels' loops, which tests/test_nf4_gemm_sass.py bounds.
struct TokenTile {
    int tokens, clocks;
};
constexpr TokenTile kSm90Forward[] = {{16, 28}, {32, 32}, {64, 50}, {128, 72}, {256, 128}};
constexpr TokenTile kSm90Backward[] = {{16, 41}, {32, 45}, {64, 53}, {128, 74}};
constexpr TokenTile kSm80Forward[] = {{16, 31}, {32, 36}, {64, 64}};
constexpr TokenTile kSm80Backward[] = {{16, 44}, {32, 45}, {64, 64}};

// A build without 90a has no wgmma in it: its kernels are empty, and 9.0 runs those of mma.sync.
#ifdef PEFTKERN_NO_SM90A
constexpr bool kHasSm90a = false;
#else
constexpr bool kHasSm90a = true;
#endif

inline bool has_wgmma(const DeviceTraits& device) {
    return kHasSm90a && device.compute_capability == 90;
}

// What the largest tile of the cp.async kernels needs of a block's shared memory, with two stages.
constexpr int kSm80SharedBytes = kStagesOffsetSm80 + 2 * Forward::kBytes<64>;
static_assert(kStagesOffsetSm80 + 2 * Forward::kBytes<32> <= 99 * 1024, "of 8.6, 8.9 and 12.0");

// The tile that takes the rows in the least time; the larger of equals.
template <int kCount>
TokenTile fastest_tile(const TokenTile (&tiles)[kCount], int count, int64_t rows) {
    TokenTile best = tiles[0];
    const auto clocks = [&](TokenTile tile) { return steps_of(rows, tile.tokens) * tile.clocks; };
    for (int i = 1; i < count; ++i)
        if (clocks(tiles[i]) <= clocks(best)) best = tiles[i];
    return best;
}
inline TokenTile token_tile(const DeviceTraits& device, bool backward, int64_t rows) {
    if (has_wgmma(device)) return backward ? fastest_tile(kSm90Backward, 4, rows) : fastest_tile(kSm90Forward, 5, rows);
    if (backward) return fastest_tile(kSm80Backward, 3, rows);
    return fastest_tile(kSm80Forward, device.shared_bytes >= kSm80SharedBytes ? 3 : 2, rows);
}

// Slices fill the processors where tiles are few, and cost a second launch and their partial sums' way through L2.
constexpr int kPlanProcessors = 128;
constexpr int kMostSlices = 8;
constexpr int kFewestSliceSteps = 4;
constexpr int64_t kSecondStageClocks = 3500;
constexpr int64_t kSecondStageBytes = 2900;  // a clock

inline GemmPlan sliced_plan(TokenTile tile, int64_t rows, int64_t columns, int64_t tile_columns, int64_t total_steps) {
    GemmPlan best{tile.tokens, 1, static_cast<int>(total_steps)};
    int64_t best_clocks = INT64_MAX;
    const int64_t tiles = steps_of(rows, tile.tokens) * steps_of(columns, tile_columns);
    const int64_t step_clocks = 16 * tile.clocks;  // 16384 weights
    for (int64_t slices = 1; slices <= kMostSlices; ++slices) {
        const int64_t steps = steps_of(total_steps, slices);
        if (slices > 1 && steps < kFewestSliceSteps) break;
        const int64_t filled = steps_of(total_steps, steps);  // no slice is empty
        int64_t clocks = steps_of(tiles * filled, kPlanProcessors) * steps * step_clocks;
        if (filled > 1) clocks += kSecondStageClocks + filled * rows * columns * 8 / kSecondStageBytes;
        if (clocks < best_clocks) {
            best_clocks = clocks;
            best.slices = static_cast<int>(filled);
            best.slice_steps = static_cast<int>(steps);
        }
    }
    return best;
}

inline GemmPlan gemm_plan(const DeviceTraits& device, bool backward, int64_t rows, int64_t out_features,
                          int64_t in_features) {
    const TokenTile tile = token_tile(device, backward, rows);
    if (backward) return sliced_plan(tile, rows, in_features, Backward::kTile, steps_of(out_features, Backward::kStep));
    return sliced_plan(tile, rows, out_features, Forward::kTile, steps_of(in_features, Forward::kStep));
}

}  // namespace peftkern
