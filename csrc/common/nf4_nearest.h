// Tables for the code of the nearest NF4 value, ties to the lower code.
#pragma once

#include <stdint.h>

#include "common/nf4_codebook.h"

namespace peftkern {

// The nearest code is the number of midpoints below the value.
struct Nf4Midpoints {
    float values[15];

    constexpr Nf4Midpoints() : values() {
        for (int i = 0; i < 15; ++i) values[i] = (kNf4Codebook[i] + kNf4Codebook[i + 1]) / 2;
    }
    constexpr float operator[](int i) const { return values[i]; }
};
static constexpr Nf4Midpoints kNf4Midpoints;

// [-1, 1] in 32 cells, each with at most one midpoint: a code is its cell's first code, plus one above the midpoint.
// The cell of a value is the whole part of value * kScale + kShift.
struct Nf4Cells {
    static constexpr float kScale = 15.99f, kShift = 16.0f;  // below 16, so that a rounding above 1 stays in cell 31
    float midpoint[32];
    int32_t first_code[32];
    bool valid;

    constexpr Nf4Cells() : midpoint(), first_code(), valid(true) {
        int passed = 0;
        for (int cell = 0; cell < 32; ++cell) {
            midpoint[cell] = 2.0f;
            first_code[cell] = passed;
            for (; passed < 15 && kNf4Midpoints[passed] * kScale + kShift < cell + 1; ++passed) {
                midpoint[cell] = kNf4Midpoints[passed];
                // Far from the cell's edges, so that the rounding of a position does not matter.
                const float place = kNf4Midpoints[passed] * kScale + kShift - cell;
                valid = valid && place > 1e-3f && place < 1 - 1e-3f;
            }
            valid = valid && passed - first_code[cell] <= 1;
        }
    }
};
alignas(64) static constexpr Nf4Cells kNf4Cells;
static_assert(kNf4Cells.valid, "a cell holds two midpoints, or one at its edge");

}  // namespace peftkern
