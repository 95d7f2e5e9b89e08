// The vector operations of the kernels in AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "common/nf4_codebook.h"

namespace peftkern {
namespace {

struct Simd {
    using F = __m256;
    using I = __m256i;
    static constexpr int kLanes = 8;
    // 12 accumulators of 16 registers: 2 loads and 6 broadcasts feed 12 FMAs, which the two FMA ports bound.
    static constexpr int kVectors = 2, kRows = 6;
    static constexpr int kNarrowRows = 12;

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float v) { return _mm256_set1_ps(v); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static F fmadd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F as_floats(I v) { return _mm256_castsi256_ps(v); }

    static F from_bf16(const uint16_t* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static void to_bf16(uint16_t* p, F v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    static F from_f16(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void to_f16(uint16_t* p, F v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }

    struct Table {
        __m256 low, high;
    };
    static Table nf4_table() { return {_mm256_load_ps(kNf4Codebook), _mm256_load_ps(kNf4Codebook + 8)}; }
    // The table's values at the low 4 bits of each lane.
    static F lookup(const Table& table, I index) {
        const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
        const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
    static I srl(I v, int count) { return _mm256_srli_epi32(v, count); }
    // Lane c has in its low 4 bits the code of column c: kLanes consecutive codes of one row.
    static I row_codes(const uint8_t* p) {
        int word;
        __builtin_memcpy(&word, p, 4);
        return _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
    }
    // out[j] lane c = word j of row c, rows being `stride` bytes apart
    __attribute__((always_inline)) static void transpose_words(const uint8_t* rows, int64_t stride, I* out) {
        __m256 r[8], t[8];
        for (int i = 0; i < 8; ++i, rows += stride) {
            __asm__("" : "+r"(rows));  // else GCC copies local rows by halves, which stall the loads of the whole
            r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows));
        }
        for (int i = 0; i < 4; ++i) {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
            r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
            r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
            r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            out[i] = _mm256_castps_si256(_mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
            out[i + 4] = _mm256_castps_si256(_mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
        }
    }

    // Philox: 64-bit lanes, a call in each, ordered so that at_least's interleave puts the columns in order.
    using Q = __m256i;
    static constexpr int kCalls = 4;
    static Q set1_64(uint64_t v) { return _mm256_set1_epi64x(static_cast<long long>(v)); }
    static Q calls_from(uint32_t first) { return _mm256_add_epi64(set1_64(first), _mm256_setr_epi64x(0, 2, 1, 3)); }
    static Q multiply_low(Q a, Q b) { return _mm256_mul_epu32(a, b); }
    // (a >> 32) ^ b ^ c
    static Q high_xor(Q a, Q b, Q c) { return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), b), c); }
    // Which of the 16-bit numbers, words 0..3's low halves and then their high halves of each call, reach the
    // threshold.
    static uint64_t at_least(Q w0, Q w1, Q w2, Q w3, uint32_t threshold) {
        if (threshold > 0xffff) return 0;
        const __m256i pair0 = _mm256_blend_epi32(w0, _mm256_slli_epi64(w1, 32), 0xaa);  // words 0, 1
        const __m256i pair1 = _mm256_blend_epi32(w2, _mm256_slli_epi64(w3, 32), 0xaa);
        // 16-bit numbers (low, high) of each word -> low halves of four words, high halves of four words: 0, 2, 1, 3.
        const __m256i low = _mm256_blend_epi16(pair0, _mm256_slli_epi32(pair1, 16), 0xaa);
        const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(pair0, 16), pair1, 0xaa);
        const __m256i in_order = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0f0e0b0a0d0c0908, 0x0706030205040100));
        const __m256i a = _mm256_shuffle_epi8(_mm256_unpacklo_epi64(low, high), in_order);
        const __m256i b = _mm256_shuffle_epi8(_mm256_unpackhi_epi64(low, high), in_order);
        const __m256i limit = _mm256_set1_epi16(static_cast<short>(threshold));
        const __m256i kept_a = _mm256_cmpeq_epi16(_mm256_max_epu16(a, limit), a);
        const __m256i kept_b = _mm256_cmpeq_epi16(_mm256_max_epu16(b, limit), b);
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(kept_a, kept_b), 0xd8);
        return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
    }
    // v in the lanes whose bit is set, else 0.
    static F keep(uint64_t bits, F v) {
        const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each);
        return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, each)));
    }
};

}  // namespace
}  // namespace peftkern
