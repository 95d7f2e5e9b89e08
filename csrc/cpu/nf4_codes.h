// Reading NF4 bytes: the scale of a block, and how the codes of an aligned matrix lie.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "common/nf4_codebook.h"
#include "cpu/gemm.h"

namespace peftkern {
namespace {

// Where rows start at whole words of 8 codes and 16 columns share a scale, codes are decoded by vectors.
constexpr int64_t kAlignedColumns = 16;

// Bit offset of element e of the 8 codes in a little-endian word: the first is the high nibble of the first byte.
constexpr int nibble_shift(int e) {
    return 8 * (e / 2) + (e % 2 ? 0 : 4);
}

// Compiled with -ffp-contract=off: product and sum are rounded one by one, as bitsandbytes does.
inline float block_absmax(const Nf4& q, int64_t block) {
    if (!q.nested_absmax) return static_cast<const float*>(q.absmax)[block];
    const float product =
        q.nested_quant_map[static_cast<const uint8_t*>(q.absmax)[block]] * q.nested_absmax[block >> 8];
    return product + q.offset;
}

inline int block_shift(const Nf4& q) {
    return __builtin_ctzll(static_cast<unsigned long long>(q.block_size));
}

inline bool aligned(const Nf4& q) {
    return q.columns % kAlignedColumns == 0;
}

// The longest run of columns, a power of two up to `most`, that always shares one scale.
inline int64_t granule(const Nf4& q, int64_t most) {
    const int64_t bits = q.columns | q.block_size | most;
    return bits & -bits;
}

// One element, in any layout.
inline float nf4_value(const Nf4& q, int64_t row, int64_t column) {
    const int64_t e = row * q.columns + column;
    const uint8_t byte = q.codes[e >> 1];
    return kNf4Codebook[e & 1 ? byte & 15 : byte >> 4] * block_absmax(q, e >> block_shift(q));
}

// A chunk of rows of codes and decoded scales, [depth, tile columns], copied to dense memory. In the matrix the rows
// lie powers of two apart: read stripe by stripe they evict each other (three times slower at 4096 columns, measured).
constexpr int64_t kStagedDepth = 512;
constexpr int64_t kStagedCodesPitch = kTileColumns / 2 + 64;
constexpr size_t kStagedCodesBytes = (kStagedDepth + 1) * kStagedCodesPitch;
constexpr size_t kStagedScalesBytes = sizeof(float) * (kStagedDepth + 1) * (kTileColumns / kAlignedColumns);

struct StagedCodes {
    uint8_t* codes;
    float* scales;
    int64_t column_begin;  // of the tile
    int64_t scales_pitch;
    int run_shift;  // columns per scale

    const uint8_t* codes_at(int64_t row, int64_t column) const {
        return codes + row * kStagedCodesPitch + (column - column_begin) / 2;
    }
    const float* scales_at(int64_t row, int64_t column) const {
        return scales + row * scales_pitch + ((column - column_begin) >> run_shift);
    }

    void fill(const Nf4& q, int64_t row_begin, int64_t rows, int64_t first_column, int64_t columns) {
        constexpr int64_t kAhead = 16;
        const int64_t run = granule(q, 64);
        run_shift = __builtin_ctzll(static_cast<unsigned long long>(run));
        column_begin = first_column;
        scales_pitch = kTileColumns >> run_shift;
        const int shift = block_shift(q);
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t e = (row_begin + i) * q.columns + first_column;
            const uint8_t* source = q.codes + (e >> 1);
            for (int64_t line = 0; line < columns / 2; line += 64)
                __builtin_prefetch(source + kAhead * (q.columns >> 1) + line);
            memcpy(codes + i * kStagedCodesPitch, source, static_cast<size_t>(columns / 2));
            float* scale = scales + i * scales_pitch;
            for (int64_t c = 0; c < columns; c += run) *scale++ = block_absmax(q, (e + c) >> shift);
        }
        // An odd last row is paired with this one: codes of any value, times 0.
        memset(scales + rows * scales_pitch, 0, static_cast<size_t>(scales_pitch) * sizeof(float));
    }
};

}  // namespace
}  // namespace peftkern
