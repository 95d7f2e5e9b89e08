// Up to four rows times NF4 rows, in AVX-512-BF16: dot products along the depth, since transposing the codes would cost
// more than the products. Codes and their look-up as in decode_bf16.h.
//
// The vector units are the limit (9 cycles for 128 codes at one row on Zen 4, of which the look-up takes 5), so the
// scales' look-ups run beside them on the integer units, some rows ahead.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "cpu/gemm.h"
#include "cpu/gemm_kernel.h"
#include "cpu/nf4_scales.h"

namespace peftkern {
namespace {

// Depth per chunk: 2 KiB of codes a row, long enough for the hardware prefetchers (1 KiB: a third slower at one row).
constexpr int64_t kDotDepth = 4096;
constexpr int64_t kDotStride = kDotDepth / 2 + 16;

// The scales of a stripe's rows, made in order in a ring of 4 groups of N rows: one in use, one ready, one looked up
// (the vector pass over it would stall right behind the narrow stores) and one being looked up.
template <int N>
class ScalesAhead {
  public:
    ScalesAhead(const RowScales& scales, int64_t row_begin, int64_t rows, float* memory)
        : scales_(scales), row_begin_(row_begin), rows_(rows), memory_(memory), interleaved_(scales.by_eights()) {
        seek(0);
        look_up_to(3 * N);
        finish(0);
    }

    const float* of(int64_t row) const { return memory_ + (row & (4 * N - 1)) * scales_.pitch(); }

    // Before the group from `row` on is used.
    void begin_group(int64_t row) {
        limit_ = smaller(rows_, row + 4 * N);
        finish(row + N);
    }
    // Eight look-ups, to be called between the products.
    void advance() {
        if (row_ >= limit_) return;
        scales_.look_up8(source_ + position_, target_ + position_);
        if ((position_ += 8) == scales_.runs) seek(row_ + 1);
    }
    // After the group from `row` on was used.
    void end_group(int64_t row) { look_up_to(row + 4 * N); }

  private:
    void seek(int64_t row) {
        row_ = interleaved_ ? row : rows_;
        position_ = 0;
        source_ = scales_.bytes_of(row_begin_ + row);
        target_ = memory_ + (row & (4 * N - 1)) * scales_.pitch();
    }
    void look_up_to(int64_t row) {
        limit_ = smaller(rows_, row);
        while (row_ < limit_) advance();
    }
    void finish(int64_t row) {
        for (int64_t end = smaller(rows_, row + N); row < end; ++row) {
            float* out = memory_ + (row & (4 * N - 1)) * scales_.pitch();
            if (!interleaved_) scales_.begin(row_begin_ + row, out);
            scales_.finish(row_begin_ + row, out);
        }
    }

    const RowScales& scales_;
    const int64_t row_begin_, rows_;
    float* const memory_;
    const bool interleaved_;
    int64_t row_, position_, limit_;
    const uint8_t* source_;
    float* target_;
};

// The sums of four vectors.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

// How a step of 128 * P columns lies in lanes. With P = 2, a lane holds two words of 8 columns of one run of 64, so
// that two vectors share a multiply by their scales; a 128-bit quarter of codes (32 columns) goes whole.
template <int P>
struct DotLanes {
    static constexpr int64_t kColumns = 128 * P;
    // Where quarter s of a step lies: vector and quarter.
    static int vector_of(int s) { return P == 1 ? 0 : s & 1; }
    static int quarter_of(int s) { return P == 1 ? s : s >> 1; }

    static void order(__m512i (&words)[P]) {
        if constexpr (P == 2) {
            const __m512i first = words[0];
            words[0] = _mm512_shuffle_i32x4(first, words[1], 0x88);
            words[1] = _mm512_shuffle_i32x4(first, words[1], 0xdd);
        }
    }
    // Which of a step's scales each lane's sum takes.
    static __m512i run_of_lane(int run_shift) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_srl_epi32(lane, _mm_cvtsi32_si128(run_shift - 2 - P));
    }
};

// X's row in the order of the codes: per vector of 128 columns 4 vectors, word t of vector i is (x[8t + i], x[8t + 4 +
// i]). Zeros follow to the end of a step.
template <int P>
void pack_dot_row(const Contraction& c, int64_t row, int64_t depth_begin, int64_t depth, uint32_t* words) {
    const uint8_t* p = element_at(c.x, row, depth_begin);
    // Of 32 columns: pair i of word t to dword 4i + t.
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 4; ++i)
        for (int t = 0; t < 4; ++t)
            for (int h = 0; h < 2; ++h) order[8 * i + 2 * t + h] = static_cast<uint16_t>(8 * t + 4 * h + i);
    const __m512i pairs = _mm512_load_si512(order);
    for (int64_t k = 0; k < depth; k += DotLanes<P>::kColumns, words += DotLanes<P>::kColumns / 2)
        for (int s = 0; s < 4 * P; ++s) {
            const int64_t rest = depth - k - 32 * s;
            const auto valid = static_cast<__mmask32>(rest < 32 ? (rest > 0 ? (1u << rest) - 1 : 0) : ~0u);
            const __m512i v = _mm512_permutexvar_epi16(pairs, _mm512_maskz_loadu_epi16(valid, p + 2 * (k + 32 * s)));
            uint32_t* to = words + 64 * DotLanes<P>::vector_of(s) + 4 * DotLanes<P>::quarter_of(s);
            _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(v));
            _mm_store_si128(reinterpret_cast<__m128i*>(to + 16), _mm512_extracti32x4_epi32(v, 1));
            _mm_store_si128(reinterpret_cast<__m128i*>(to + 32), _mm512_extracti32x4_epi32(v, 2));
            _mm_store_si128(reinterpret_cast<__m128i*>(to + 48), _mm512_extracti32x4_epi32(v, 3));
        }
}

// c [R, N] += x [R, depth] @ (N rows of codes)^T, whose scales lie `pitch` apart.
template <int R, int N, int P, int M>
void dot_rows(const RowScales& w, const uint8_t* codes, int64_t codes_pitch, const float* scales, ScalesAhead<M>& ahead,
              const uint32_t* x, float* c) {
    const __m256i half_table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kNf4Bf16Codebook));
    const __m512i table = _mm512_broadcast_i64x4(half_table);  // twice: the look-up reads 5 bits, the codes are 4
    const __m512i run_of_lane = DotLanes<P>::run_of_lane(w.run_shift);
    const int64_t runs_per_step = DotLanes<P>::kColumns >> w.run_shift, depth = w.runs << w.run_shift;
    const int64_t scales_pitch = w.pitch();
    __m512 total[(R * N + 3) / 4 * 4];
#pragma GCC unroll 8
    for (auto& t : total) t = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += DotLanes<P>::kColumns, x += 64 * P, scales += runs_per_step) {
        __m512i words[N][P];
        __m512 acc[R][N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                const uint8_t* at = codes + n * codes_pitch + (k >> 1) + 64 * p;
                const int64_t rest = depth - k - 128 * p;
                const auto valid =
                    static_cast<__mmask16>(rest < 128 ? (rest > 0 ? (1u << (rest / 8)) - 1 : 0) : 0xffff);
                __builtin_prefetch(at + N * codes_pitch, 0, 2);
                words[n][p] = _mm512_maskz_loadu_epi32(valid, at);
            }
            DotLanes<P>::order(words[n]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][n] = _mm512_setzero_ps();
        }
        ahead.advance();
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    const __m512i value =
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(words[n][p], nibble_shift(i)), table);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        const __m512i row = _mm512_load_si512(x + r * kDotStride + 64 * p + 16 * i);
                        acc[r][n] = _mm512_dpbf16_ps(acc[r][n], reinterpret_cast<__m512bh>(value),
                                                     reinterpret_cast<__m512bh>(row));
                    }
                }
            }
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const __m512 scale = _mm512_permutexvar_ps(run_of_lane, _mm512_loadu_ps(scales + n * scales_pitch));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total[r * N + n] = _mm512_fmadd_ps(acc[r][n], scale, total[r * N + n]);
        }
    }
    alignas(16) float sums[(R * N + 3) / 4 * 4];
#pragma GCC unroll 2
    for (int i = 0; i < R * N; i += 4)
        _mm_store_ps(sums + i, sums_of(total[i], total[i + 1], total[i + 2], total[i + 3]));
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) c[r * kAccumulatorStride + n] += sums[r * N + n];
}

// c [R, rows] += x [R, depth] @ (rows of the weight)^T.
template <int R, int N, int P>
void dot_columns(const RowScales& w, int64_t row_begin, int64_t rows, float* scales_memory, const uint32_t* x,
                 float* c) {
    const int64_t pitch = w.q.columns >> 1;
    const uint8_t* codes = w.q.codes + row_begin * pitch + (w.column >> 1);
    ScalesAhead<N> ahead(w, row_begin, rows, scales_memory);
    for (int64_t n = 0; n < rows; n += N) {
        ahead.begin_group(n);
        if (rows - n >= N)
            dot_rows<R, N, P>(w, codes + n * pitch, pitch, ahead.of(n), ahead, x, c + n);
        else
            for (int64_t i = n; i < rows; ++i)
                dot_rows<R, 1, P>(w, codes + i * pitch, pitch, ahead.of(i), ahead, x, c + i);
        ahead.end_group(n);
    }
}

// The accumulator += X @ W^T for up to 4 rows; N rows of W at a time, in chunks of `chunk` columns.
template <int R, int N, int P>
void dot_tile(const Contraction& c, const Tile& tile, const Workspace& workspace, int run_shift, int64_t chunk) {
    for (int64_t k = 0; k < c.depth; k += chunk) {
        const int64_t depth = smaller(chunk, c.depth - k);
        for (int r = 0; r < R; ++r) pack_dot_row<P>(c, tile.m_begin + r, k, depth, workspace.rows + r * kDotStride);
        const RowScales scales = {*c.nf4, k, depth >> run_shift, run_shift};
        dot_columns<R, N, P>(scales, tile.n_begin, tile.n_end - tile.n_begin,
                             reinterpret_cast<float*>(workspace.stripe), workspace.rows, workspace.accumulator);
    }
}

}  // namespace
}  // namespace peftkern
