// Bf16Dot: how X and W are laid out for AVX-512-BF16 dot products. A packed word holds two consecutive contraction
// elements, the first in its low half. NF4 weights are decoded in fp32 and rounded once.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/nf4_codes.h"
#include "cpu/panel_fp32.h"

namespace peftkern {
namespace {

struct Bf16Dot {
    static constexpr int kDepth = 2;
    using W = __m512i;
    static W load(const uint32_t* p) { return _mm512_load_si512(p); }
    static void store(uint32_t* p, W w) { _mm512_store_si512(p, w); }
    static W broadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
    static __m512 dot(__m512 acc, W x, W w) {
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
    }
    // Of kDepth rows, the words of their columns, and the elements of one.
    static W words_of(const __m512 (&rows)[2]) {
        const __m512i columns = _mm512_setr_epi32(
            0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006, 0x00170007, 0x00180008,
            0x00190009, 0x001a000a, 0x001b000b, 0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f);
        return _mm512_permutexvar_epi16(columns, round_pairs(rows[0], rows[1]));
    }
    static void store_elements(uint32_t* p, __m512 row) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(row)));
    }

    static bool words_in_place(const Contraction& c) { return c.depth % kDepth == 0; }

    static void pack_row(const Contraction& c, int64_t row, int64_t depth_begin, int64_t depth, uint32_t* words) {
        words[depth / 2] = 0;
        memcpy(words, element_at(c.x, row, depth_begin), static_cast<size_t>(2 * depth));
    }

    template <int V, class Emit>
    static void columns_of(const Columns& w, Emit emit) {
        if (w.c.nf4 && !aligned(*w.c.nf4)) return nf4_unaligned<V>(w, emit);
        if (w.c.nf4 && w.c.weight_transposed) return nf4_transposed<V>(w, emit);
        direct_columns_of<V>(w, emit);
    }

    // As Fp32Dot's; few rows times transposed NF4 are Decode's.
    static bool is_direct(const Contraction& c) { return !c.nf4 || (aligned(*c.nf4) && !c.weight_transposed); }
    template <int V, class Emit>
    static void direct_columns_of(const Columns& w, Emit emit) {
        if (w.c.nf4) return nf4_rows<V>(w, emit);
        return w.c.weight_transposed ? dense_transposed<V>(w, emit) : dense_rows<V>(w, emit);
    }

  private:
    // Two vectors of 8 columns x 2 depths, lanes alternating between the depths, to one vector of 16 columns.
    static W round_pairs(__m512 first, __m512 second) {
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    }

    template <int V, class Emit>
    static void nf4_transposed(const Columns& w, Emit emit) {
        const __m512 table = Simd::nf4_table();
        const __m512i first8 = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        const __m512i last8 = _mm512_add_epi32(first8, _mm512_set1_epi32(8));
        const __m512i shifts = _mm512_set1_epi64(4);  // the high nibble, then the low one
        Nf4Block<2> block;
        for (int64_t k = 0; k < w.depth; k += block.kDepth)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                block.load(*w.c.nf4, w.begin + v * 16, w.count - v * 16, w.depth_begin + k, w.depth - k);
                for (int64_t j = 0; j < block.word_count; ++j) {
                    const __m512i a = _mm512_permutexvar_epi32(first8, block.words[j]);
                    const __m512i b = _mm512_permutexvar_epi32(last8, block.words[j]);
                    const float* scales = block.scales_of(j);
                    const __m512 scale_a = _mm512_load_ps(scales), scale_b = _mm512_load_ps(scales + 16);
#pragma GCC unroll 4
                    for (int pair = 0; pair < 4; ++pair) {
                        const __m512i shift = _mm512_add_epi32(shifts, _mm512_set1_epi32(8 * pair));
                        const __m512 w_a = Simd::lookup(table, _mm512_srlv_epi32(a, shift)) * scale_a;
                        const __m512 w_b = Simd::lookup(table, _mm512_srlv_epi32(b, shift)) * scale_b;
                        emit(k / 2 + 4 * j + pair, v, round_pairs(w_a, w_b));
                    }
                }
            }
    }

    // Two rows share a table of 32 rounded weights, 16 codes x their two scales, remade where a scale begins. One
    // 16-bit look-up then gives 16 columns x 2 rows.
    template <int V, class Emit>
    static void nf4_rows(const Columns& w, Emit emit) {
        const __m512 codebook = Simd::nf4_table();
        // Of 8 bytes of both rows in each 128-bit lane: column c's byte of the first row in word 2c, of the second in
        // 2c + 1.
        const __m512i bytes =
            _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 8, 8, 0, 0, 8, 8, 1, 1, 9, 9, 1, 1, 9, 9)),
                            _mm512_setr_epi64(0, 0, 0x0202020202020202, 0x0202020202020202, 0x0404040404040404,
                                              0x0404040404040404, 0x0606060606060606, 0x0606060606060606));
        const __m512i shifts = _mm512_set1_epi64(0x0000000000040004);  // even columns: the high nibble
        const __m512i low = _mm512_set1_epi32(0x000f000f), second = _mm512_set1_epi32(0x00100000);
        const int vectors_per_run = 1 << (w.staged.run_shift - 4);
        for (int64_t k = 0; k < w.depth; k += 2) {
            const uint8_t* codes = w.staged.codes_at(k, w.begin);
            __m512i table = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                if (v == 0 || (v & (vectors_per_run - 1)) == 0) {
                    const float* scale = w.staged.scales_at(k, w.begin + v * 16);
                    table = round_pairs(codebook * _mm512_set1_ps(scale[0]),
                                        codebook * _mm512_set1_ps(scale[w.staged.scales_pitch]));
                }
                long long codes0, codes1;
                memcpy(&codes0, codes + v * 8, 8);
                memcpy(&codes1, codes + v * 8 + kStagedCodesPitch, 8);
                const __m512i both = _mm512_mask_set1_epi64(_mm512_set1_epi64(codes0), 0xaa, codes1);
                const __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(both, bytes), shifts);
                const __m512i select = _mm512_ternarylogic_epi32(index, low, second, 0xea);  // index & low | second
                emit(k / 2, v, _mm512_permutexvar_epi16(select, table));
            }
        }
    }

    template <int V, class Emit>
    static void nf4_unaligned(const Columns& w, Emit emit) {
        const Nf4& q = *w.c.nf4;
        for (int64_t k = 0; k < w.depth; k += 2)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                alignas(64) float values[32] = {};
                for (int64_t i = 0; i < smaller(16, w.count - v * 16); ++i)
                    for (int64_t d = 0; d < smaller(2, w.depth - k); ++d) {
                        const int64_t n = w.begin + v * 16 + i, row = w.depth_begin + k + d;
                        values[2 * i + d] = w.c.weight_transposed ? nf4_value(q, n, row) : nf4_value(q, row, n);
                    }
                emit(k / 2, v, round_pairs(_mm512_load_ps(values), _mm512_load_ps(values + 16)));
            }
    }

    // words[j] lane i = elements 2j and 2j + 1 of row i, of up to 16 rows of up to 32 elements.
    PEFTKERN_APART static void load_columns(const uint8_t* block, int64_t pitch, int64_t rows, int64_t count,
                                            __m512i (&words)[16]) {
        // 64 rows are more streams than the hardware prefetchers follow.
        for (int i = 0; i < 16; ++i) __builtin_prefetch(block + i * pitch + 128, 0, 2);
        if (rows == 16 && count == 32) return Simd::transpose_words(block, pitch, words);
        alignas(64) uint8_t padded[16][64] = {};
        for (int64_t i = 0; i < rows; ++i) memcpy(padded[i], block + i * pitch, static_cast<size_t>(2 * count));
        Simd::transpose_words(padded[0], sizeof padded[0], words);
    }

    template <int V, class Emit>
    static void dense_transposed(const Columns& w, Emit emit) {
        const Matrix& matrix = w.c.weight;
        __m512i words[16];
        for (int64_t k = 0; k < w.depth; k += 32)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const int64_t count = smaller(32, w.depth - k);
                load_columns(element_at(matrix, w.begin + v * 16, w.depth_begin + k), 2 * matrix.stride,
                             smaller(16, w.count - v * 16), count, words);
                for (int64_t j = 0; j < divide_up(count, 2); ++j) emit(k / 2 + j, v, words[j]);
            }
    }

    // Rows lie pages apart, which the hardware prefetchers do not follow.
    static constexpr int64_t kRowsAhead = 16;

    template <int V, class Emit>
    static void dense_rows(const Columns& w, Emit emit) {
        const int64_t pitch = 2 * w.c.weight.stride;
        for (int64_t k = 0; k < w.depth; k += 2) {
            const uint8_t* row = element_at(w.c.weight, w.depth_begin + k, w.begin);
#pragma GCC unroll 2
            for (int64_t line = 0; line < 32 * V; line += 64) {
                __builtin_prefetch(row + kRowsAhead * pitch + line, 0, 2);
                __builtin_prefetch(row + (kRowsAhead + 1) * pitch + line, 0, 2);
            }
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const auto valid = static_cast<__mmask16>((1u << smaller(16, w.count - v * 16)) - 1);
                const __mmask16 pair = k + 1 < w.depth ? valid : 0;
                const uint8_t* first = row + 32 * v;
                const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, first));
                const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(pair, first + pitch));
                emit(k / 2, v, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }
};

}  // namespace
}  // namespace peftkern
