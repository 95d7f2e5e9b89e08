// Few rows times NF4 rows, in AVX-512-BF16: bf16 codes go straight from a 16-bit look-up to the dot products, and each
// block's scale multiplies its sum. 1.75 instructions a vector of 32 weights instead of 7.5, at the price of R * V
// multiply-adds a block, so for few rows only.
//
// The codes' table is rounded to bf16 at a scale where its errors cancel (nf4_codebook.h); scales stay fp32. A lane's two
// contraction elements are k and k + 4 of a word of 8 codes: those need no more than a shift of 16-bit halves.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/gemm_kernel.h"
#include "cpu/nf4_codes.h"

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

// c [R, V * 16] += x [R, depth] @ V vectors of rows of q
template <int R, int V>
void decode_columns(const Nf4& q, int64_t row_begin, int64_t rows, int64_t depth_begin, int64_t depth, const uint32_t* x,
                    float* c) {
    const __m256i half_table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kNf4Bf16Codebook));
    const __m512i table = _mm512_broadcast_i64x4(half_table);  // twice: the look-up reads 5 bits, the codes are 4
    const __m512 unscale = _mm512_set1_ps(1.0f / kNf4Bf16Scale);
    Nf4Block<1> blocks[V];
    for (int64_t k = 0; k < depth; k += Nf4Block<1>::kDepth) {
        for (int v = 0; v < V; ++v) blocks[v].load(q, row_begin + v * 16, rows - v * 16, depth_begin + k, depth - k);
        const int64_t word_count = blocks[0].word_count, run = int64_t{1} << (blocks[0].run_shift - 3);
        for (int64_t begin = 0; begin < word_count; begin += run) {
            __m512 acc[R][V];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
            const int64_t end = smaller(begin + run, word_count);
            for (int64_t j = begin; j < end; ++j) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    __m512i w[V];
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) {
                        const __m512i codes = blocks[v].words[j];
                        w[v] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, nibble_shift(i)), table);
                    }
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) {
                        const __m512i row = _mm512_set1_epi32(static_cast<int>(x[r * kPackedStride + k / 2 + 4 * j + i]));
#pragma GCC unroll 4
                        for (int v = 0; v < V; ++v)
                            acc[r][v] = _mm512_dpbf16_ps(acc[r][v], reinterpret_cast<__m512bh>(row),
                                                         reinterpret_cast<__m512bh>(w[v]));
                    }
                }
            }
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const __m512 scale = _mm512_load_ps(blocks[v].scales_of(begin)) * unscale;
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    float* p = c + r * kAccumulatorStride + v * 16;
                    _mm512_storeu_ps(p, _mm512_fmadd_ps(acc[r][v], scale, _mm512_loadu_ps(p)));
                }
            }
        }
    }
}

template <int V, int R>
void decode_columns(int64_t count, const Nf4& q, int64_t row_begin, int64_t rows, int64_t depth_begin, int64_t depth,
                    const uint32_t* x, float* c) {
    if (count == R) return decode_columns<R, V>(q, row_begin, rows, depth_begin, depth, x, c);
    if constexpr (R > 1) decode_columns<V, R - 1>(count, q, row_begin, rows, depth_begin, depth, x, c);
}

constexpr int64_t kDecodeRows = 16;

struct Decode {
    static bool takes(const Contraction& c, int64_t rows) {
        return c.bf16_dot && c.nf4 && c.weight_transposed && aligned(*c.nf4) && rows <= kDecodeRows;
    }

    static void run(const Contraction& c, const Tile& tile, const Workspace& workspace) {
        const int64_t rows = tile.m_end - tile.m_begin;
        for (int64_t k = 0; k < c.depth; k += 2 * kChunkWords) {
            const int64_t depth = smaller(2 * kChunkWords, c.depth - k);
            for (int64_t m = 0; m < rows; ++m)
                pack_decode_row(c, tile.m_begin + m, k, depth, workspace.rows + m * kPackedStride);
            const int64_t step = rows <= Simd::kRows ? 64 : 16;
            for (int64_t n = tile.n_begin; n < tile.n_end; n += step) {
                const int64_t columns = smaller(step, tile.n_end - n);
                float* accumulator = workspace.accumulator + (n - tile.n_begin);
                if (columns > 48)
                    decode_columns<4, Simd::kRows>(rows, *c.nf4, n, columns, k, depth, workspace.rows, accumulator);
                else
                    for (int64_t i = 0; i < columns; i += 16)
                        decode_columns<1, kDecodeRows>(rows, *c.nf4, n + i, columns - i, k, depth, workspace.rows, accumulator + i);
            }
        }
    }
};

}  // namespace
}  // namespace peftkern
