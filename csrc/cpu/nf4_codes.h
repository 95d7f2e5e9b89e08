// Reading NF4 bytes: the scale of a block, and how the codes of an aligned matrix lie.
#pragma once

#include <stdint.h>

#include "common/nf4_codebook.h"
#include "cpu/gemm.h"

namespace peftkern {
namespace {

// Where rows start at whole words of 8 codes and 16 columns share a scale, codes are decoded by vectors.
constexpr int64_t kAlignedColumns = 16;

// Bit offset of element e of the 8 codes in a little-endian word: the first is the high nibble of the first byte.
constexpr int nibble_shift(int e) { return 8 * (e / 2) + (e % 2 ? 0 : 4); }

// Compiled with -ffp-contract=off: product and sum are rounded one by one, as bitsandbytes does.
inline float block_absmax(const Nf4& q, int64_t block) {
    if (!q.nested_absmax) return static_cast<const float*>(q.absmax)[block];
    const float product = q.nested_quant_map[static_cast<const uint8_t*>(q.absmax)[block]] * q.nested_absmax[block >> 8];
    return product + q.offset;
}

inline int block_shift(const Nf4& q) { return __builtin_ctzll(static_cast<unsigned long long>(q.block_size)); }

inline bool aligned(const Nf4& q) { return q.columns % kAlignedColumns == 0; }

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

}  // namespace
}  // namespace peftkern
