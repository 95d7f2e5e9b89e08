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

// out[i] = table[indices[i]] on the integer units, two to a store: a gather takes the vector units' time.
inline void copy_entries(const float* table, const uint8_t* indices, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t bytes;
        memcpy(&bytes, indices + i, 8);
        for (int j = 0; j < 8; j += 2, bytes >>= 16) {
            uint32_t low, high;
            memcpy(&low, table + (bytes & 255), 4);
            memcpy(&high, table + (bytes >> 8 & 255), 4);
            uint64_t both = low | static_cast<uint64_t>(high) << 32;
            __asm__("" : "+r"(both));  // an integer register
            memcpy(out + i + j, &both, 8);
        }
    }
    for (; i < count; ++i) out[i] = table[indices[i]];
}

// Depth per chunk: 2 KiB of codes a row, long enough for the hardware prefetchers (1 KiB: a third slower at one row).
constexpr int64_t kDotDepth = 4096;
constexpr int64_t kDotStride = kDotDepth / 2 + 16;
constexpr int64_t kDecodeRuns = kDotDepth / kAlignedColumns;

// The distance between two rows' scales, with a vector's overhang.
inline int64_t scales_pitch(int64_t runs) {
    return divide_up(runs, 16) * 16 + 16;
}

// The scales of rows of q, `runs` runs of columns from `column` on, over kNf4Bf16Scale: out [rows, scales_pitch(runs)].
inline void run_scales(const Nf4& q, int64_t row_begin, int64_t rows, int64_t column, int64_t runs, int run_shift,
                       float* out) {
    const int64_t out_pitch = scales_pitch(runs);
    const float unscale = 1.0f / kNf4Bf16Scale;
    const int shift = block_shift(q);
    const int64_t begin = row_begin * q.columns + column;
    if (run_shift != shift || !q.nested_absmax) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < runs; ++i) {
                const int64_t e = begin + r * q.columns + (i << run_shift);
                out[r * out_pitch + i] = block_absmax(q, e >> shift) * unscale;
            }
        return;
    }
    // In two passes over all rows: reading vectors right behind narrower stores stalls.
    const int64_t first = begin >> shift, pitch = q.columns >> shift;
    for (int64_t r = 0; r < rows; ++r)
        copy_entries(q.nested_quant_map, static_cast<const uint8_t*>(q.absmax) + first + r * pitch, runs,
                     out + r * out_pitch);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < runs;) {
            const int64_t block = first + r * pitch + i, count = smaller(runs - i, 256 - (block & 255));
            const __m512 nested = _mm512_set1_ps(q.nested_absmax[block >> 8]), offset = _mm512_set1_ps(q.offset);
            for (int64_t end = i + count; i < end; i += 16) {
                const auto valid = static_cast<__mmask16>(end - i < 16 ? (1u << (end - i)) - 1 : 0xffff);
                float* p = out + r * out_pitch + i;
                const __m512 product = _mm512_maskz_loadu_ps(valid, p) * nested;
                _mm512_mask_storeu_ps(p, valid, (product + offset) * _mm512_set1_ps(unscale));
            }
            i = block - first - r * pitch + count;
        }
}

// The same for 16 rows of q, transposed: [run][16 rows], 0 in lanes beyond `rows`.
inline void transposed_scales(const Nf4& q, int64_t row_begin, int64_t rows, int64_t column, int64_t runs,
                              int run_shift, float* out) {
    alignas(64) float scales[16 * (kDecodeRuns + 16)];
    __m512i transposed[16];
    const int64_t pitch = scales_pitch(runs), valid = rows < 0 ? 0 : smaller(16, rows);
    run_scales(q, row_begin, valid, column, runs, run_shift, scales);
    memset(scales + valid * pitch, 0, static_cast<size_t>((16 - valid) * pitch) * sizeof(float));
    for (int64_t i = 0; i < runs; i += 16) {
        Simd::transpose_words(reinterpret_cast<const uint8_t*>(scales + i), pitch * 4, transposed);
        for (int64_t j = 0; j < smaller(16, runs - i); ++j) _mm512_store_si512(out + 16 * (i + j), transposed[j]);
    }
}

// Rows of q as the dot products read them, and where a task's scales lie.
struct DecodeRows {
    const Nf4& q;
    int64_t begin, count, depth_begin, depth;
    int run_shift;
    float* scales;  // of each row, scales_pitch apart; or per vector of 16 rows [kDecodeRuns][16]
};

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
                         const float* scales, const uint32_t* x, float* c) {
    if (rows == R) return multiply_codes<R, V>(words, word_count, run, scales, x, c);
    if constexpr (R > 1) multiply_codes_rows<V, R - 1>(rows, words, word_count, run, scales, x, c);
}

// c [rows, V * 16] += x [rows, depth] @ V vectors of rows of q, in groups of up to R rows of x.
template <int V, int R>
void decode_columns(int64_t rows, const DecodeRows& w, const uint32_t* x, float* c) {
    const int64_t pitch = w.q.columns >> 1, run = int64_t{1} << (w.run_shift - 3);
    const int64_t group = divide_up(rows, divide_up(rows, R));
    __m512i words[V][16];
    // The next stripe is fetched a line at a time in the order of memory: the hardware prefetchers then run ahead,
    // which they do not in the order of use (a fifth of the time of one row, measured).
    const uint8_t* next = w.q.codes + (w.begin + V * 16) * pitch + (w.depth_begin >> 1);
    int64_t next_line = 0;
    for (int v = 0; v < V; ++v)
        transposed_scales(w.q, w.begin + v * 16, w.count - v * 16, w.depth_begin, w.depth >> w.run_shift, w.run_shift,
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
            multiply_codes_rows<V, R>(smaller(group, rows - m), words, word_count, run, scales,
                                      x + m * kPackedStride + k / 2, c + m * kAccumulatorStride);
    }
}

// The dot products of N rows of q with R rows of x, along the depth: for the fewest rows, where transposing the codes
// costs more than the products. c [R, N] += x [R, depth] @ q^T
template <int R, int N>
void dot_rows(const DecodeRows& w, const uint32_t* x, float* c) {
    const __m256i half_table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kNf4Bf16Codebook));
    const __m512i table = _mm512_broadcast_i64x4(half_table);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i run_of_lane = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(w.run_shift - 3));  // a lane is 8 columns
    const int64_t pitch = w.q.columns >> 1, runs_per_step = 128 >> w.run_shift;
    const uint8_t* codes = w.q.codes + w.begin * pitch + (w.depth_begin >> 1);
    const int64_t out_pitch = scales_pitch(w.depth >> w.run_shift);
    __m512 total[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[r][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.depth; k += 128, x += 64) {
        const int64_t rest = w.depth - k;
        const auto valid = static_cast<__mmask16>(rest < 128 ? (1u << (rest / 8)) - 1 : 0xffff);
        __m512i word[N];
        __m512 acc[R][N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const uint8_t* p = codes + n * pitch + (k >> 1);
            __builtin_prefetch(p + N * pitch, 0, 2);
            word[n] = _mm512_maskz_loadu_epi32(valid, p);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][n] = _mm512_setzero_ps();
        }
        // R * N independent sums between two uses of one: a dot product takes 6 cycles.
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                const __m512i value = _mm512_permutexvar_epi16(_mm512_srli_epi16(word[n], nibble_shift(i)), table);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const __m512i row = _mm512_load_si512(x + r * kDotStride + i * 16);
                    acc[r][n] =
                        _mm512_dpbf16_ps(acc[r][n], reinterpret_cast<__m512bh>(value), reinterpret_cast<__m512bh>(row));
                }
            }
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const float* scales = w.scales + n * out_pitch + (k >> 7) * runs_per_step;
            const __m512 scale = _mm512_permutexvar_ps(run_of_lane, _mm512_loadu_ps(scales));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total[r][n] = _mm512_fmadd_ps(acc[r][n], scale, total[r][n]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) c[r * kAccumulatorStride + n] += _mm512_reduce_add_ps(total[r][n]);
}

// X's row for dot_rows: of each 128 elements, word j of vector i holds (x[8j + i], x[8j + 4 + i]).
inline void pack_dot_row(const Contraction& c, int64_t row, int64_t depth_begin, int64_t depth, uint32_t* words) {
    alignas(64) uint32_t pairs[64];
    for (int64_t k = 0; k < depth; k += 128) {
        memset(pairs, 0, sizeof pairs);
        pack_decode_row(c, row, depth_begin + k, smaller(128, depth - k), pairs);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 16; ++j) words[k / 2 + 16 * i + j] = pairs[4 * j + i];
    }
}

template <int R, int N>
void dot_columns(DecodeRows w, const uint32_t* x, float* c) {
    constexpr int64_t kBlock = 32;  // rows whose scales fit the stripe memory
    float* scales = w.scales;
    const int64_t pitch = scales_pitch(w.depth >> w.run_shift);
    for (int64_t rest = w.count; rest > 0; rest -= kBlock) {
        w.count = smaller(kBlock, rest);
        w.scales = scales;
        run_scales(w.q, w.begin, w.count, w.depth_begin, w.depth >> w.run_shift, w.run_shift, scales);
        for (; w.count >= N; w.begin += N, w.count -= N, w.scales += N * pitch, c += N) dot_rows<R, N>(w, x, c);
        for (; w.count > 0; ++w.begin, --w.count, w.scales += pitch, ++c) dot_rows<R, 1>(w, x, c);
    }
}

struct Decode {
    // 24 accumulators of 6 x 4 or 12 x 2 vectors; up to 4 rows, totals of 4 x 2.
    static constexpr int64_t kMostRows = 24, kMostDotRows = 4;

    static bool takes(const Contraction& c, int64_t rows) {
        return c.bf16_dot && c.nf4 && c.weight_transposed && aligned(*c.nf4) && rows <= kMostRows;
    }

    // The accumulator += X @ W^T.
    static void run(const Contraction& c, const Tile& tile, const Workspace& workspace) {
        const int64_t rows = tile.m_end - tile.m_begin;
        const bool dot = rows <= kMostDotRows;
        const int64_t chunk = dot ? kDotDepth : 2 * kChunkWords, step = dot ? kTileColumns : rows <= 6 ? 64 : 32;
        const int run_shift = __builtin_ctzll(static_cast<unsigned long long>(granule(*c.nf4, 128)));
        for (int64_t k = 0; k < c.depth; k += chunk) {
            const int64_t depth = smaller(chunk, c.depth - k);
            for (int64_t m = 0; m < rows; ++m)
                if (dot)
                    pack_dot_row(c, tile.m_begin + m, k, depth, workspace.rows + m * kDotStride);
                else
                    pack_decode_row(c, tile.m_begin + m, k, depth, workspace.rows + m * kPackedStride);
            for (int64_t n = tile.n_begin; n < tile.n_end; n += step) {
                const DecodeRows w = {*c.nf4,
                                      n,
                                      smaller(step, tile.n_end - n),
                                      k,
                                      depth,
                                      run_shift,
                                      reinterpret_cast<float*>(workspace.stripe)};
                float* accumulator = workspace.accumulator + (n - tile.n_begin);
                if (rows == 1)
                    dot_columns<1, 4>(w, workspace.rows, accumulator);
                else if (rows == 2)
                    dot_columns<2, 4>(w, workspace.rows, accumulator);
                else if (rows == 3)
                    dot_columns<3, 2>(w, workspace.rows, accumulator);
                else if (rows == 4)
                    dot_columns<4, 1>(w, workspace.rows, accumulator);
                else if (rows <= 6)
                    decode_columns<4, 6>(rows, w, workspace.rows, accumulator);
                else
                    decode_columns<2, 12>(rows, w, workspace.rows, accumulator);
            }
        }
    }
};

}  // namespace
}  // namespace peftkern
