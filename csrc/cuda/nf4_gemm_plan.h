// The tile and the slices of an NF4 GEMM: a function of the shape and of constants only, so that a call gives the same
// bits on every chip of an architecture and under any load.
#pragma once

#include <stdint.h>

namespace peftkern {

struct GemmPlan {
    int tokens;       // of a tile
    int slices;       // of the contraction
    int slice_steps;  // steps of 128 of in (forward) or 64 of out (dX) in a slice
};

// Clocks of one step of a tile and of the second stage, from byte and issue counts: a step takes its codes' share of
// the memory bandwidth (8 KB at 23 B a clock) or its tensor work, whichever is longer; the second stage a launch and
// its bytes at 2900 a clock.
constexpr int kPlanProcessors = 128;
constexpr int kMostSlices = 8;
constexpr int kFewestSliceSteps = 4;
constexpr int64_t kStepClocks = 450;
constexpr int64_t kTokenClocks = 8;
constexpr int64_t kSecondStageClocks = 3500;
constexpr int64_t kSecondStageBytes = 2900;

inline GemmPlan plan_slices(int tokens, int64_t rows, int64_t columns, int64_t tile_columns, int64_t total_steps) {
    GemmPlan best{tokens, 1, static_cast<int>(total_steps)};
    int64_t best_clocks = INT64_MAX;
    const int64_t tiles = (rows + tokens - 1) / tokens * ((columns + tile_columns - 1) / tile_columns);
    const int64_t step_clocks = tokens * kTokenClocks > kStepClocks ? tokens * kTokenClocks : kStepClocks;
    for (int64_t slices = 1; slices <= kMostSlices; ++slices) {
        const int64_t steps = (total_steps + slices - 1) / slices;
        if (slices > 1 && steps < kFewestSliceSteps) break;
        const int64_t filled = (total_steps + steps - 1) / steps;  // no slice is empty
        const int64_t waves = (tiles * filled + kPlanProcessors - 1) / kPlanProcessors;
        int64_t clocks = waves * steps * step_clocks;
        if (filled > 1) clocks += kSecondStageClocks + filled * rows * columns * 8 / kSecondStageBytes;
        if (clocks < best_clocks) {
            best_clocks = clocks;
            best.slices = static_cast<int>(filled);
            best.slice_steps = static_cast<int>(steps);
        }
    }
    return best;
}

// The smallest tile of tokens that holds the rows, else the largest.
inline int token_tile(int64_t rows, int largest) {
    int tokens = 16;
    while (tokens < rows && tokens < largest) tokens *= 2;
    return tokens;
}

}  // namespace peftkern
