// The dropout mask of peftkern/ops/_dropout.py, regenerated: Philox4x32-10 (Salmon et al., SC 2011), one call per 8
// columns. A call's words stay in 64-bit lanes, where one multiplication gives the high and the low half.
#pragma once

#include <stdint.h>

#include "cpu/gemm.h"

namespace peftkern {
namespace {

// Bit i: whether column 8 * group + i of the row is kept, for the 8 * Simd::kCalls columns of as many calls.
inline uint64_t keep_bits(const Dropout& dropout, uint64_t row, uint32_t group) {
    using Q = Simd::Q;
    Q c0 = Simd::calls_from(group), c1 = Simd::set1_64(row & 0xffffffff);
    Q c2 = Simd::set1_64(0), c3 = Simd::set1_64(row >> 32);
    const Q m0 = Simd::set1_64(0xD2511F53), m1 = Simd::set1_64(0xCD9E8D57);
    uint32_t key0 = static_cast<uint32_t>(dropout.seed), key1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Q a = Simd::multiply_low(c0, m0), b = Simd::multiply_low(c2, m1);
        c0 = Simd::high_xor(b, c1, Simd::set1_64(key0));
        c2 = Simd::high_xor(a, c3, Simd::set1_64(key1));
        c1 = b;  // only the low halves are read from here on
        c3 = a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return Simd::at_least(c0, c1, c2, c3, dropout.threshold);
}

// values[c] *= keep_scale or 0, for columns column .. column + count - 1 of a row; column is a multiple of 8. `values`
// has room for a vector's overhang.
inline void apply_dropout(const Dropout& dropout, int64_t row, int64_t column, int64_t count, float* values) {
    constexpr int kColumns = 8 * Simd::kCalls;
    const Simd::F scale = Simd::set1(dropout.keep_scale);
    if (dropout.rows) row = dropout.rows[row];
    for (int64_t done = 0; done < count; done += kColumns) {
        uint64_t bits = keep_bits(dropout, static_cast<uint64_t>(row), static_cast<uint32_t>((column + done) / 8));
        const int64_t end = done + kColumns < count ? done + kColumns : count;
        for (int64_t c = done; c < end; c += Simd::kLanes, bits >>= Simd::kLanes % 64)
            Simd::store(values + c, Simd::keep(bits, Simd::load(values + c) * scale));
    }
}

}  // namespace
}  // namespace peftkern
