// The dropout mask of peftkern/ops/_dropout.py, regenerated: Philox4x32-10 (Salmon et al., SC 2011), one call per 8
// columns. Written so that the compiler vectorises over 16 calls.
#pragma once

#include <stdint.h>

#include "cpu/gemm.h"

namespace peftkern {
namespace {

constexpr int kPhiloxCalls = 16;
constexpr int kPhiloxColumns = 8 * kPhiloxCalls;

// Random words of the calls for column groups first_group .. first_group + 15 of one row.
inline void philox_words(uint64_t seed, uint64_t row, uint32_t first_group, uint32_t words[4][kPhiloxCalls]) {
    for (int i = 0; i < kPhiloxCalls; ++i) {
        words[0][i] = first_group + static_cast<uint32_t>(i);
        words[1][i] = static_cast<uint32_t>(row);
        words[2][i] = 0;
        words[3][i] = static_cast<uint32_t>(row >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kPhiloxCalls; ++i) {
            const uint64_t a = words[0][i] * 0xD2511F53ull, b = words[2][i] * 0xCD9E8D57ull;
            words[0][i] = static_cast<uint32_t>(b >> 32) ^ words[1][i] ^ key0;
            words[1][i] = static_cast<uint32_t>(b);
            words[2][i] = static_cast<uint32_t>(a >> 32) ^ words[3][i] ^ key1;
            words[3][i] = static_cast<uint32_t>(a);
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// values[c] *= keep_scale or 0, for columns column .. column + count - 1 of a row; column is a multiple of 8.
inline void apply_dropout(const Dropout& dropout, int64_t row, int64_t column, int64_t count, float* values) {
    uint32_t words[4][kPhiloxCalls];
    float keep[kPhiloxColumns];
    for (int64_t done = 0; done < count; done += kPhiloxColumns) {
        philox_words(dropout.seed, static_cast<uint64_t>(row), static_cast<uint32_t>((column + done) / 8), words);
        for (int i = 0; i < kPhiloxCalls; ++i)
            for (int e = 0; e < 4; ++e) {
                keep[8 * i + e] = (words[e][i] & 0xffff) >= dropout.threshold ? dropout.keep_scale : 0.0f;
                keep[8 * i + 4 + e] = (words[e][i] >> 16) >= dropout.threshold ? dropout.keep_scale : 0.0f;
            }
        const int64_t n = count - done < kPhiloxColumns ? count - done : kPhiloxColumns;
        for (int64_t c = 0; c < n; ++c) values[done + c] = keep[c] != 0 ? values[done + c] * keep[c] : 0.0f;
    }
}

}  // namespace
}  // namespace peftkern
