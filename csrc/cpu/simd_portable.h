// The vector operations of the kernels on any CPU: 8 lanes of compiler vectors.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/nf4_codebook.h"

namespace peftkern {
namespace {

struct Simd {
    typedef float F __attribute__((vector_size(32)));
    typedef uint32_t I __attribute__((vector_size(32)));
    typedef int32_t Signed __attribute__((vector_size(32)));
    static constexpr int kLanes = 8;
    static constexpr int kVectors = 2, kRows = 2;  // the micro-kernel's accumulators: kRows x kVectors
    static constexpr int kNarrowRows = 4;          // and where one vector spans the columns

    static F zero() { return F{}; }
    static F set1(float v) { return F{} + v; }
    static F load(const float* p) {
        F v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float* p, F v) { memcpy(p, &v, sizeof v); }
    static F fmadd(F a, F b, F c) { return a * b + c; }
    static F as_floats(I v) { return reinterpret_cast<F>(v); }

    static F from_bf16(const uint16_t* p) {
        I bits;
        for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<uint32_t>(p[i]) << 16;
        return reinterpret_cast<F>(bits);
    }
    static void to_bf16(uint16_t* p, F v) {
        const I bits = reinterpret_cast<I>(v);
        for (int i = 0; i < kLanes; ++i) {
            const uint32_t b = bits[i];
            const bool nan = (b & 0x7fffffff) > 0x7f800000;
            p[i] = nan ? 0x7fc0 : static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
        }
    }
    static F from_f16(const uint16_t* p) {
        F v;
        for (int i = 0; i < kLanes; ++i) {
            const uint32_t sign = (p[i] & 0x8000u) << 16, magnitude = p[i] & 0x7fffu;
            // Shifted into fp32's exponent field, then rescaled by 2^(127-15): exact, denormals included.
            uint32_t bits = magnitude << 13;
            float f;
            memcpy(&f, &bits, 4);
            f *= 0x1p112f;
            memcpy(&bits, &f, 4);
            if (magnitude >= 0x7c00) bits |= 0x7f800000;
            bits |= sign;
            memcpy(&f, &bits, 4);
            v[i] = f;
        }
        return v;
    }
    static void to_f16(uint16_t* p, F v) {
        const I all = reinterpret_cast<I>(v);
        for (int i = 0; i < kLanes; ++i) {
            const uint32_t sign = (all[i] >> 16) & 0x8000, bits = all[i] & 0x7fffffff;
            uint32_t half;
            if (bits > 0x7f800000) {
                half = 0x7e00;
            } else if (bits >= 0x477ff000) {  // rounds to 65536 or more
                half = 0x7c00;
            } else if (bits < 0x38800000) {  // denormal: adding 0.5 leaves the rounded mantissa in the low bits
                float f;
                memcpy(&f, &bits, 4);
                f += 0.5f;
                memcpy(&half, &f, 4);
                half -= 0x3f000000;
            } else {
                half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
            }
            p[i] = static_cast<uint16_t>(sign | half);
        }
    }

    struct Table {};
    static Table nf4_table() { return {}; }
    // The table's values at the low 4 bits of each lane.
    static F lookup(Table, I index) {
        F v;
        for (int i = 0; i < kLanes; ++i) v[i] = kNf4Codebook[index[i] & 15];
        return v;
    }
    static I srl(I v, int count) { return v >> static_cast<uint32_t>(count); }
    // Lane c has in its low 4 bits the code of column c: kLanes consecutive codes of one row.
    static I row_codes(const uint8_t* p) {
        I v;
        for (int i = 0; i < kLanes; ++i) v[i] = p[i / 2] >> (i % 2 ? 0 : 4);
        return v;
    }
    // out[j] lane c = word j of row c, rows being `stride` bytes apart
    static void transpose_words(const uint8_t* rows, int64_t stride, I* out) {
        for (int c = 0; c < kLanes; ++c) {
            uint32_t words[kLanes];
            memcpy(words, rows + c * stride, sizeof words);
            for (int j = 0; j < kLanes; ++j) out[j][c] = words[j];
        }
    }

    // Philox: 64-bit lanes, a call in each.
    typedef uint64_t Q __attribute__((vector_size(32)));
    static constexpr int kCalls = 4;
    static Q set1_64(uint64_t v) { return Q{} + v; }
    static Q calls_from(uint32_t first) { return set1_64(first) + Q{0, 1, 2, 3}; }
    static Q multiply_low(Q a, Q b) { return (a & 0xffffffff) * (b & 0xffffffff); }
    // (a >> 32) ^ b ^ c
    static Q high_xor(Q a, Q b, Q c) { return (a >> 32) ^ b ^ c; }
    // Which of the 16-bit numbers, words 0..3's low halves and then their high halves of each call, reach the
    // threshold.
    static uint64_t at_least(Q w0, Q w1, Q w2, Q w3, uint32_t threshold) {
        const Q words[4] = {w0, w1, w2, w3};
        uint64_t bits = 0;
        for (int call = 0; call < kCalls; ++call)
            for (int e = 0; e < 8; ++e) {
                const uint64_t number = words[e & 3][call] >> (e < 4 ? 0 : 16) & 0xffff;
                bits |= static_cast<uint64_t>(number >= threshold) << (8 * call + e);
            }
        return bits;
    }
    // v in the lanes whose bit is set, else 0.
    static F keep(uint64_t bits, F v) {
        for (int i = 0; i < kLanes; ++i) v[i] = bits >> i & 1 ? v[i] : 0.0f;
        return v;
    }
};

}  // namespace
}  // namespace peftkern
