// Few rows times NF4 rows, in AVX-512-BF16: bf16 codes go straight from a 16-bit look-up to the dot products, and each
// block's scale multiplies its sum. 1.75 instructions a vector of 32 weights instead of 7.5, at the price of R * V
// multiply-adds a block, so for few rows only.
//
// The codes' table is rounded to bf16 at a scale where its errors cancel (nf4_codebook.h); scales stay fp32. A lane's
// two contraction elements are k and k + 4 of a word of 8 codes: those need no more than a shift of 16-bit halves.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "cpu/dot_bf16.h"
#include "cpu/gemm.h"
#include "cpu/gemm_kernel.h"
#include "cpu/nf4_codes.h"
#include "cpu/nf4_scales.h"

namespace peftkern {
namespace {

// X's row in the order of the codes: words (x[k], x[k + 4]) for k = 0..3 of each 8.
inline void pack_decode_row(const Contraction& c, int64_t row, int64_t depth_begin, int64_t depth, uint32_t* words) {
    const uint8_t* p = element_at(c.x, row, depth_begin);
    for (int64_t k = 0; k < depth; k += 32) {
        const auto valid = static_cast<__mmask32>(depth - k < 32 ? (1u << (depth - k)) - 1 : ~0u);
        const __m512i v = _mm512_maskz_loadu_epi16(valid, p + 2 * k);
        _mm512_store_si512(words + k / 2, _mm512_unpacklo_epi16(v, _mm512_bsrli_epi128(v, 8)));
    }
}

// c [R, V * 16] += x [R, 8 * word_count] @ the codes of V vectors of rows, up to 128 codes each.
template <int R, int V>
void multiply_codes(const __m512i (&words)[V][16], int64_t word_count, int64_t run, const float* scales,
                    const uint32_t* x, float* c) {
    const __m256i half_table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kNf4Bf16Codebook));
    const __m512i table = _mm512_broadcast_i64x4(half_table);  // twice: the look-up reads 5 bits, the codes are 4
    for (int64_t begin = 0; begin < word_count; begin += run, scales += 16) {
        __m512 acc[R][V];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
        for (int64_t j = begin; j < smaller(begin + run, word_count); ++j) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                __m512i value[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v)
                    value[v] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[v][j], nibble_shift(i)), table);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const __m512i row = _mm512_set1_epi32(static_cast<int>(x[r * kPackedStride + 4 * j + i]));
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v)
                        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], reinterpret_cast<__m512bh>(value[v]),
                                                     reinterpret_cast<__m512bh>(row));
                }
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __m512 scale = _mm512_load_ps(scales + v * 16 * kMostRuns);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                float* p = c + r * kAccumulatorStride + v * 16;
                _mm512_storeu_ps(p, _mm512_fmadd_ps(acc[r][v], scale, _mm512_loadu_ps(p)));
            }
        }
    }
}

template <int V, int R>
void multiply_codes_rows(int64_t rows, const __m512i (&words)[V][16], int64_t word_count, int64_t run,
                         const float* scales, const uint32_t* x, float* c) {
    if (rows == R) return multiply_codes<R, V>(words, word_count, run, scales, x, c);
    if constexpr (R > 1) multiply_codes_rows<V, R - 1>(rows, words, word_count, run, scales, x, c);
}

// c [rows, V * 16] += x [rows, depth] @ V vectors of rows of the weight, `count` of which are its own, in groups of up
// to R rows of x.
template <int V, int R>
void decode_columns(int64_t rows, const RowScales& w, int64_t row_begin, int64_t count, float* scales_memory,
                    const uint32_t* x, float* c) {
    const int64_t pitch = w.q.columns >> 1, run = int64_t{1} << (w.run_shift - 3), depth = w.runs << w.run_shift;
    const int64_t group = divide_up(rows, divide_up(rows, R));
    __m512i words[V][16];
    // The next stripe is fetched a line at a time in the order of memory: the hardware prefetchers then run ahead,
    // which they do not in the order of use (a fifth of the time of one row, measured).
    const uint8_t* next = w.q.codes + (row_begin + V * 16) * pitch + (w.column >> 1);
    int64_t next_line = 0;
    for (int v = 0; v < V; ++v)
        transposed_scales(w, row_begin + v * 16, count - v * 16, scales_memory + v * 16 * kMostRuns);
    for (int64_t k = 0; k < depth; k += 128) {
        const int64_t word_count = smaller(128, depth - k) / 8;
        for (int v = 0; v < V; ++v) {
            for (int i = 0; i < 16; ++i, next_line += 64) {
                if (next_line >= depth >> 1) next_line = 0, next += pitch;
                __builtin_prefetch(next + next_line, 0, 2);
            }
            const uint8_t* codes = w.q.codes + (row_begin + v * 16) * pitch + ((w.column + k) >> 1);
            load_words(codes, pitch, count - v * 16, word_count, words[v]);
        }
        const float* scales = scales_memory + (k >> w.run_shift) * 16;
        for (int64_t m = 0; m < rows; m += group)
            multiply_codes_rows<V, R>(smaller(group, rows - m), words, word_count, run, scales,
                                      x + m * kPackedStride + k / 2, c + m * kAccumulatorStride);
    }
}

// The accumulator += X @ W^T for 5 to 24 rows; V vectors of rows of W at a time.
template <int V, int R>
void decode_tile(const Contraction& c, const Tile& tile, const Workspace& workspace, int run_shift) {
    const int64_t rows = tile.m_end - tile.m_begin;
    for (int64_t k = 0; k < c.depth; k += 2 * kChunkWords) {
        const int64_t depth = smaller(2 * kChunkWords, c.depth - k);
        for (int64_t m = 0; m < rows; ++m)
            pack_decode_row(c, tile.m_begin + m, k, depth, workspace.rows + m * kPackedStride);
        const RowScales scales = {*c.nf4, k, depth >> run_shift, run_shift};
        for (int64_t n = tile.n_begin; n < tile.n_end; n += V * 16)
            decode_columns<V, R>(rows, scales, n, smaller(V * 16, tile.n_end - n),
                                 reinterpret_cast<float*>(workspace.stripe), workspace.rows,
                                 workspace.accumulator + (n - tile.n_begin));
    }
}

struct Decode {
    // 24 accumulators of 6 x 4 or 12 x 2 vectors; up to 4 rows, totals of 4 x 2.
    static constexpr int64_t kMostRows = 24;

    static bool takes(const Contraction& c, int64_t rows) {
        return c.bf16_dot && c.nf4 && c.weight_transposed && aligned(*c.nf4) && rows <= kMostRows;
    }

    // The accumulator += X @ W^T.
    static void run(const Contraction& c, const Tile& tile, const Workspace& workspace) {
        const int64_t rows = tile.m_end - tile.m_begin;
        const int run_shift = __builtin_ctzll(static_cast<unsigned long long>(granule(*c.nf4, 128)));
        const bool pairs = run_shift >= 6;
        if (rows == 1) return dot_tile<1, 4, 1>(c, tile, workspace, run_shift, kDotDepth);
        if (rows == 2) return dot_tile<2, 4, 1>(c, tile, workspace, run_shift, kDotDepth);
        if (rows == 3)
            return pairs ? dot_tile<3, 2, 2>(c, tile, workspace, run_shift, kDotDepth)
                         : dot_tile<3, 2, 1>(c, tile, workspace, run_shift, kDotDepth);
        if (rows == 4)
            return pairs ? dot_tile<4, 2, 2>(c, tile, workspace, run_shift, kDotDepth)
                         : dot_tile<4, 2, 1>(c, tile, workspace, run_shift, kDotDepth);
        if (rows <= 6) return decode_tile<4, 6>(c, tile, workspace, run_shift);
        return decode_tile<2, 12>(c, tile, workspace, run_shift);
    }
};

}  // namespace
}  // namespace peftkern
