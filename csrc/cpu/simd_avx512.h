// The vector operations of the kernels in AVX-512 F, BW, VL and DQ.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "common/nf4_codebook.h"

namespace peftkern {
namespace {

struct Simd {
    using F = __m512;
    using I = __m512i;
    static constexpr int kLanes = 16;
    // 24 accumulators of 32 registers: 4 loads and 6 broadcasts feed 24 FMAs; 12 x 32 loads less and measured slower.
    static constexpr int kVectors = 4, kRows = 6;
    static constexpr int kNarrowRows = 16;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float v) { return _mm512_set1_ps(v); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F as_floats(I v) { return _mm512_castsi512_ps(v); }

    static F from_bf16(const uint16_t* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static void to_bf16(uint16_t* p, F v) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
        const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    }
    static F from_f16(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void to_f16(uint16_t* p, F v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }

    using Table = __m512;
    static Table nf4_table() { return _mm512_load_ps(kNf4Codebook); }
    // The table's values at the low 4 bits of each lane.
    static F lookup(Table table, I index) { return _mm512_permutexvar_ps(index, table); }
    static I srl(I v, int count) { return _mm512_srli_epi32(v, static_cast<unsigned>(count)); }
    // Lane c has in its low 4 bits the code of column c: kLanes consecutive codes of one row.
    static I row_codes(const uint8_t* p) {
        long long words;
        __builtin_memcpy(&words, p, 8);
        const __m512i second = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const __m512i shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
        return _mm512_srlv_epi32(_mm512_permutexvar_epi32(second, _mm512_set1_epi64(words)), shift);
    }
    // out[j] lane c = word j of row c, rows being `stride` bytes apart
    __attribute__((always_inline)) static void transpose_words(const uint8_t* rows, int64_t stride, I* out) {
        __m512i r[16], t[16];
        for (int i = 0; i < 16; ++i, rows += stride) {
            __asm__("" : "+r"(rows));  // else GCC computes the 16 addresses in vector registers
            r[i] = _mm512_loadu_si512(rows);
        }
        for (int i = 0; i < 8; ++i) {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 4; ++i) {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        // Word j of quarter q is now in r[4 * row group + j] quarter q; gather the four row groups of each quarter.
        for (int j = 0; j < 4; ++j) {
            const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88),
                          b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
            const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
            const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
            out[j] = _mm512_shuffle_i32x4(a, c, 0x88);
            out[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
            out[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
            out[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
        }
    }

    // Philox: 64-bit lanes, a call in each, ordered so that at_least's interleave puts the columns in order.
    using Q = __m512i;
    static constexpr int kCalls = 8;
    static Q set1_64(uint64_t v) { return _mm512_set1_epi64(static_cast<long long>(v)); }
    static Q calls_from(uint32_t first) {
        return _mm512_add_epi64(set1_64(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    }
    static Q multiply_low(Q a, Q b) { return _mm512_mul_epu32(a, b); }
    // (a >> 32) ^ b ^ c
    static Q high_xor(Q a, Q b, Q c) { return _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), b, c, 0x96); }
    // Which of the 16-bit numbers, words 0..3's low halves and then their high halves of each call, reach the
    // threshold.
    static uint64_t at_least(Q w0, Q w1, Q w2, Q w3, uint32_t threshold) {
        if (threshold > 0xffff) return 0;
        const __m512i pair0 = _mm512_mask_blend_epi32(0xaaaa, w0, _mm512_slli_epi64(w1, 32));  // words 0, 1
        const __m512i pair1 = _mm512_mask_blend_epi32(0xaaaa, w2, _mm512_slli_epi64(w3, 32));
        // 16-bit numbers (low, high) of each word -> low halves of four words, high halves of four words.
        const __m512i low = _mm512_mask_blend_epi16(0xaaaaaaaa, pair0, _mm512_slli_epi32(pair1, 16));
        const __m512i high = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(pair0, 16), pair1);
        // Now numbers 0, 2, 1, 3 of the call: put in order.
        const __m512i in_order = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0f0e0b0a0d0c0908, 0x0706030205040100));
        const __m512i a = _mm512_shuffle_epi8(_mm512_unpacklo_epi64(low, high), in_order);
        const __m512i b = _mm512_shuffle_epi8(_mm512_unpackhi_epi64(low, high), in_order);
        const __m512i limit = _mm512_set1_epi16(static_cast<short>(threshold));
        return _mm512_cmpge_epu16_mask(a, limit) | static_cast<uint64_t>(_mm512_cmpge_epu16_mask(b, limit)) << 32;
    }
    // v in the lanes whose bit is set, else 0.
    static F keep(uint64_t bits, F v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }
};

}  // namespace
}  // namespace peftkern
