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
    static __m512i load(const uint32_t* p) { return _mm512_load_si512(p); }
    static __m512i broadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
    static __m512 dot(__m512 acc, __m512i x, __m512i w) {
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
    }

    static void pack_row(const Contraction& c, int64_t row, int64_t depth_begin, int64_t depth, uint32_t* words) {
        words[depth / 2] = 0;
        memcpy(words, element_at(c.x, row, depth_begin), static_cast<size_t>(2 * depth));
    }

    static void pack_stripe(const Contraction& c, const StagedCodes& staged, int64_t depth_begin, int64_t depth,
                            int64_t column_begin, int64_t columns, int vectors, uint32_t* panel) {
        if (c.nf4 && !aligned(*c.nf4)) {
            nf4_unaligned(c, depth_begin, depth, column_begin, columns, vectors, panel);
        } else if (c.nf4 && c.weight_transposed) {
            nf4_transposed(*c.nf4, depth_begin, depth, column_begin, columns, vectors, panel);
        } else if (c.nf4) {
            nf4_rows(staged, depth, column_begin, vectors, panel);
        } else if (c.weight_transposed) {
            dense_transposed(c.weight, depth_begin, depth, column_begin, columns, vectors, panel);
        } else {
            dense_rows(c.weight, depth_begin, depth, column_begin, columns, vectors, panel);
        }
    }

private:
    // Two vectors of 8 columns x 2 depths, lanes alternating between the depths, to one vector of 16 columns.
    static __m512i round_pairs(__m512 first, __m512 second) {
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    }

    static void nf4_transposed(const Nf4& q, int64_t depth_begin, int64_t depth, int64_t column_begin, int64_t columns,
                               int vectors, uint32_t* panel) {
        const __m512 table = Simd::nf4_table();
        const __m512i first8 = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        const __m512i last8 = _mm512_add_epi32(first8, _mm512_set1_epi32(8));
        const __m512i shifts = _mm512_set1_epi64(4);  // the high nibble, then the low one
        const int64_t step = vectors * 16;
        for (int64_t block = 0; block < depth; block += 128)
            for (int v = 0; v < vectors; ++v) {
                uint32_t* target = panel + block / 2 * step + v * 16;
                Fp32Dot::nf4_words<2>(
                    q, depth_begin + block, smaller(128, depth - block), column_begin + v * 16, columns - v * 16,
                    [&](int64_t k, __m512i codes, const float* scales) {
                        const __m512i a = _mm512_permutexvar_epi32(first8, codes);
                        const __m512i b = _mm512_permutexvar_epi32(last8, codes);
                        const __m512 scale_a = _mm512_load_ps(scales), scale_b = _mm512_load_ps(scales + 16);
                        uint32_t* p = target + k / 2 * step;
#pragma GCC unroll 4
                        for (int pair = 0; pair < 4; ++pair, p += step) {
                            const __m512i shift = _mm512_add_epi32(shifts, _mm512_set1_epi32(8 * pair));
                            const __m512 w_a = Simd::lookup(table, _mm512_srlv_epi32(a, shift)) * scale_a;
                            const __m512 w_b = Simd::lookup(table, _mm512_srlv_epi32(b, shift)) * scale_b;
                            _mm512_store_si512(p, round_pairs(w_a, w_b));
                        }
                    });
            }
    }

    // Two rows share a table of 32 rounded weights, 16 codes x their two scales, remade where a scale changes. One
    // 16-bit look-up then gives 16 columns x 2 rows.
    static void nf4_rows(const StagedCodes& staged, int64_t depth, int64_t column, int vectors, uint32_t* panel) {
        const __m512 codebook = Simd::nf4_table();
        // Of 8 bytes of both rows in each 128-bit lane: column c's byte of the first row in word 2c, of the second in 2c + 1.
        const __m512i bytes = _mm512_add_epi8(
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 8, 8, 0, 0, 8, 8, 1, 1, 9, 9, 1, 1, 9, 9)),
            _mm512_setr_epi64(0, 0, 0x0202020202020202, 0x0202020202020202, 0x0404040404040404, 0x0404040404040404,
                              0x0606060606060606, 0x0606060606060606));
        const __m512i shifts = _mm512_set1_epi64(0x0000000000040004);  // even columns: the high nibble
        const __m512i low = _mm512_set1_epi32(0x000f000f), second = _mm512_set1_epi32(0x00100000);
        const int vectors_per_run = 1 << (staged.run_shift - 4);
        for (int64_t k = 0; k < depth; k += 2) {
            const uint8_t* codes = staged.codes_at(k, column);
            const float* scales = staged.scales_at(k, column);
            __m512i table = _mm512_setzero_si512();
            for (int v = 0; v < vectors; ++v, panel += 16) {
                if ((v & (vectors_per_run - 1)) == 0) {
                    const float* scale = scales + (v * 16 >> staged.run_shift);
                    table = round_pairs(codebook * _mm512_set1_ps(scale[0]),
                                        codebook * _mm512_set1_ps(scale[staged.scales_pitch]));
                }
                long long codes0, codes1;
                memcpy(&codes0, codes + v * 8, 8);
                memcpy(&codes1, codes + v * 8 + kStagedCodesPitch, 8);
                const __m512i both = _mm512_mask_set1_epi64(_mm512_set1_epi64(codes0), 0xaa, codes1);
                const __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(both, bytes), shifts);
                const __m512i select = _mm512_ternarylogic_epi32(index, low, second, 0xea);  // index & low | second
                _mm512_store_si512(panel, _mm512_permutexvar_epi16(select, table));
            }
        }
    }

    static void nf4_unaligned(const Contraction& c, int64_t depth_begin, int64_t depth, int64_t column_begin,
                              int64_t columns, int vectors, uint32_t* panel) {
        alignas(64) float values[2][16];
        const Nf4& q = *c.nf4;
        for (int64_t k = depth_begin; k < depth_begin + depth; k += 2)
            for (int v = 0; v < vectors; ++v, panel += 16) {
                for (int i = 0; i < 16; ++i)
                    for (int d = 0; d < 2; ++d) {
                        const int64_t column = column_begin + v * 16 + i;
                        const bool any = v * 16 + i < columns && k + d < depth_begin + depth;
                        values[i / 8][i % 8 * 2 + d] =
                            any ? (c.weight_transposed ? nf4_value(q, column, k + d) : nf4_value(q, k + d, column)) : 0;
                    }
                _mm512_store_si512(panel, round_pairs(_mm512_load_ps(values[0]), _mm512_load_ps(values[1])));
            }
    }

    static void dense_transposed(const Matrix& w, int64_t depth_begin, int64_t depth, int64_t column_begin,
                                 int64_t columns, int vectors, uint32_t* panel) {
        alignas(64) uint8_t padded[16][64];
        __m512i words[16];
        for (int v = 0; v < vectors; ++v)
            for (int64_t k = 0; k < depth; k += 32) {
                const int64_t count = smaller(32, depth - k), rows = smaller(16, columns - v * 16);
                const uint8_t* block = element_at(w, column_begin + v * 16, depth_begin + k);
                if (rows == 16 && count == 32) {
                    Simd::transpose_words(block, 2 * w.stride, words);
                } else {
                    memset(padded, 0, sizeof padded);
                    for (int64_t i = 0; i < rows; ++i)
                        memcpy(padded[i], block + i * 2 * w.stride, static_cast<size_t>(2 * count));
                    Simd::transpose_words(padded[0], sizeof padded[0], words);
                }
                for (int64_t j = 0; j < divide_up(count, 2); ++j)
                    _mm512_store_si512(panel + ((k / 2 + j) * vectors + v) * 16, words[j]);
            }
    }

    static void dense_rows(const Matrix& w, int64_t depth_begin, int64_t depth, int64_t column_begin, int64_t columns,
                           int vectors, uint32_t* panel) {
        alignas(64) uint16_t padded[2][16];
        for (int64_t k = 0; k < depth; k += 2)
            for (int v = 0; v < vectors; ++v, panel += 16) {
                const int64_t count = smaller(16, columns - v * 16);
                const uint8_t* rows[2] = {element_at(w, depth_begin + k, column_begin + v * 16), nullptr};
                const bool pair = k + 1 < depth;
                rows[1] = pair ? rows[0] + 2 * w.stride : reinterpret_cast<const uint8_t*>(padded[1]);
                if (count < 16 || !pair) {
                    memset(padded, 0, sizeof padded);
                    for (int d = 0; d < (pair ? 2 : 1); ++d) {
                        memcpy(padded[d], rows[d], static_cast<size_t>(2 * count));
                        rows[d] = reinterpret_cast<const uint8_t*>(padded[d]);
                    }
                }
                const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[0])));
                const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[1])));
                _mm512_store_si512(panel, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
    }
};

}  // namespace
}  // namespace peftkern
