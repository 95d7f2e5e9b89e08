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

// out[i] = table[indices[i]] on the integer units: a gather would take the vector units' time, and more of it.
__attribute__((optimize("no-tree-vectorize"))) inline void copy_entries(const float* table, const uint8_t* indices,
                                                                        int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, table + indices[i], 4);
        memcpy(out + i, &bits, 4);
    }
}

// The scales of 16 rows of q, transposed: [run of columns][16 rows], 0 in lanes beyond `rows`, over kNf4Bf16Scale.
inline void decode_scales(const Nf4& q, int64_t row_begin, int64_t rows, int64_t column, int64_t depth, int run_shift,
                          float* out) {
    const __m512 unscale = _mm512_set1_ps(1.0f / kNf4Bf16Scale);
    const int shift = block_shift(q);
    const int64_t runs = divide_up(depth, int64_t{1} << run_shift);
    alignas(64) float block[16][16] = {}, nested[16] = {}, offset[16] = {};
    __m512i transposed[16];
    for (int64_t i = 0; i < runs; i += 16) {
        const int64_t count = smaller(16, runs - i);
        for (int64_t r = 0; r < smaller(16, rows); ++r) {
            const int64_t e = (row_begin + r) * q.columns + column + (i << run_shift), first = e >> shift;
            if (run_shift == shift && q.nested_absmax && first >> 8 == (first + count - 1) >> 8) {
                copy_entries(q.nested_quant_map, static_cast<const uint8_t*>(q.absmax) + first, count, block[r]);
                nested[r] = q.nested_absmax[first >> 8];
                offset[r] = q.offset;
            } else {
                for (int64_t j = 0; j < count; ++j) block[r][j] = block_absmax(q, (e + (j << run_shift)) >> shift);
                nested[r] = 1;
                offset[r] = 0;
            }
        }
        Simd::transpose_words(reinterpret_cast<const uint8_t*>(block), sizeof block[0], transposed);
        for (int64_t j = 0; j < count; ++j, out += 16) {
            const __m512 product = _mm512_castsi512_ps(transposed[j]) * _mm512_load_ps(nested);
            _mm512_store_ps(out, (product + _mm512_load_ps(offset)) * unscale);
        }
    }
}

// Rows of q as the dot products read them, and where a task's scales lie.
struct DecodeRows {
    const Nf4& q;
    int64_t begin, count, depth_begin, depth;
    int run_shift;
    float* scales;  // per vector of 16 rows kDecodeRuns x 16
};

constexpr int64_t kDecodeDepth = 4096;
constexpr int64_t kDecodeRuns = kDecodeDepth / kAlignedColumns;

// c [R, V * 16] += x [R, 8 * word_count] @ the codes of V vectors of rows, up to 128 codes each.
template <int R, int V>
void multiply_codes(const __m512i (&words)[V][16], int64_t word_count, int64_t run, const float* scales,
                    const uint32_t* x, int64_t x_pitch, float* c) {
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
                    const __m512i row = _mm512_set1_epi32(static_cast<int>(x[r * x_pitch + 4 * j + i]));
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v)
                        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], reinterpret_cast<__m512bh>(row),
                                                     reinterpret_cast<__m512bh>(value[v]));
                }
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __m512 scale = _mm512_load_ps(scales + v * 16 * kDecodeRuns);
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
                         const float* scales, const uint32_t* x, int64_t x_pitch, float* c) {
    if (rows == R) return multiply_codes<R, V>(words, word_count, run, scales, x, x_pitch, c);
    if constexpr (R > 1) multiply_codes_rows<V, R - 1>(rows, words, word_count, run, scales, x, x_pitch, c);
}

// c [rows, V * 16] += x [rows, depth] @ V vectors of rows of q, in groups of up to R rows of x.
template <int V, int R>
void decode_columns(int64_t rows, const DecodeRows& w, const uint32_t* x, int64_t x_pitch, float* c) {
    const int64_t pitch = w.q.columns >> 1, run = int64_t{1} << (w.run_shift - 3);
    const int64_t group = divide_up(rows, divide_up(rows, R));
    __m512i words[V][16];
    // The next stripe is fetched a line at a time in the order of memory: the hardware prefetchers then run ahead, which
    // they do not in the order of use (a fifth of the time of one row, measured).
    const uint8_t* next = w.q.codes + (w.begin + V * 16) * pitch + (w.depth_begin >> 1);
    int64_t next_line = 0;
    for (int v = 0; v < V; ++v)
        decode_scales(w.q, w.begin + v * 16, w.count - v * 16, w.depth_begin, w.depth, w.run_shift,
                      w.scales + v * 16 * kDecodeRuns);
    for (int64_t k = 0; k < w.depth; k += 128) {
        const int64_t word_count = smaller(128, w.depth - k) / 8;
        for (int v = 0; v < V; ++v) {
            for (int i = 0; i < 16; ++i, next_line += 64) {
                if (next_line >= w.depth >> 1) next_line = 0, next += pitch;
                __builtin_prefetch(next + next_line, 0, 2);
            }
            const uint8_t* codes = w.q.codes + (w.begin + v * 16) * pitch + ((w.depth_begin + k) >> 1);
            load_words(codes, pitch, w.count - v * 16, word_count, words[v]);
        }
        const float* scales = w.scales + (k >> w.run_shift) * 16;
        for (int64_t m = 0; m < rows; m += group)
            multiply_codes_rows<V, R>(smaller(group, rows - m), words, word_count, run, scales, x + m * x_pitch + k / 2,
                                      x_pitch, c + m * kAccumulatorStride);
    }
}

struct Decode {
    static constexpr int64_t kMostRows = 24;

    static bool takes(const Contraction& c, int64_t rows) {
        return c.bf16_dot && c.nf4 && c.weight_transposed && aligned(*c.nf4) && rows <= kMostRows;
    }

    // The accumulator += X @ W^T.
    static void run(const Contraction& c, const Tile& tile, const Workspace& workspace) {
        const int64_t rows = tile.m_end - tile.m_begin;
        const int64_t chunk = smaller(kDecodeDepth, 8192 / rows / 128 * 128);  // so that x's words stay in half of L1
        const int64_t x_pitch = chunk / 2 + 16, step = rows <= 6 ? 64 : 32;
        const int run_shift = __builtin_ctzll(static_cast<unsigned long long>(granule(*c.nf4, 128)));
        for (int64_t k = 0; k < c.depth; k += chunk) {
            const int64_t depth = smaller(chunk, c.depth - k);
            for (int64_t m = 0; m < rows; ++m)
                pack_decode_row(c, tile.m_begin + m, k, depth, workspace.rows + m * x_pitch);
            for (int64_t n = tile.n_begin; n < tile.n_end; n += step) {
                const DecodeRows w = {*c.nf4, n, smaller(step, tile.n_end - n), k, depth, run_shift,
                                      reinterpret_cast<float*>(workspace.stripe)};
                float* accumulator = workspace.accumulator + (n - tile.n_begin);
                // 24 accumulators: 6 x 4 or 12 x 2 vectors.
                if (step == 64)
                    decode_columns<4, 6>(rows, w, workspace.rows, x_pitch, accumulator);
                else
                    decode_columns<2, 12>(rows, w, workspace.rows, x_pitch, accumulator);
            }
        }
    }
};

}  // namespace
}  // namespace peftkern
