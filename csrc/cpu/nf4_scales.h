// The fp32 scales of NF4 rows for the bf16 code table, over kNf4Bf16Scale (AVX-512).
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "common/nf4_codebook.h"
#include "cpu/gemm_kernel.h"
#include "cpu/nf4_codes.h"

namespace peftkern {
namespace {

// The scales of `runs` runs of 2^run_shift columns of a row, from `column` on. What is written for a row is followed by
// 16 zeros: readers take whole vectors, and codes past the end must not meet NaN.
struct RowScales {
    const Nf4& q;
    int64_t column, runs;
    int run_shift;

    // The distance between two rows' scales.
    int64_t pitch() const { return divide_up(runs, 16) * 16 + 16; }

    // Whether `begin` is look_up8 on every 8 bytes.
    bool by_eights() const { return q.nested_absmax && per_block() && runs % 8 == 0; }
    const uint8_t* bytes_of(int64_t row) const { return static_cast<const uint8_t*>(q.absmax) + first_block(row); }

    // On the integer units, two entries to a store: a gather takes the vector units' time.
    void look_up8(const uint8_t* bytes, float* out) const {
        uint64_t indices;
        memcpy(&indices, bytes, 8);
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2, indices >>= 16) {
            uint32_t low, high;
            memcpy(&low, q.nested_quant_map + (indices & 255), 4);
            memcpy(&high, q.nested_quant_map + (indices >> 8 & 255), 4);
            uint64_t both = low | static_cast<uint64_t>(high) << 32;
            __asm__("" : "+r"(both));  // an integer register
            memcpy(out + j, &both, 8);
        }
    }

    // A row's scales are made in two passes: vectors read right behind narrower stores stall.
    void begin(int64_t row, float* out) const {
        if (by_eights()) {
            const uint8_t* bytes = bytes_of(row);
            for (int64_t i = 0; i < runs; i += 8) look_up8(bytes + i, out + i);
        } else if (q.nested_absmax || !per_block()) {
            const int shift = block_shift(q);
            const int64_t first = row * q.columns + column;
            for (int64_t i = 0; i < runs; ++i) out[i] = block_absmax(q, (first + (i << run_shift)) >> shift);
        }
    }
    void finish(int64_t row, float* out) const {
        constexpr float kUnscale = 1.0f / kNf4Bf16Scale;
        const int64_t first = first_block(row);
        const bool nested = by_eights();
        const float* source = q.nested_absmax || !per_block() ? out : static_cast<const float*>(q.absmax) + first;
        const __m512 offset = _mm512_set1_ps(nested ? q.offset * kUnscale : 0.0f);
        for (int64_t i = 0; i < runs;) {
            const int64_t end = nested ? smaller(runs, i + 256 - ((first + i) & 255)) : runs;
            const __m512 factor = _mm512_set1_ps((nested ? q.nested_absmax[(first + i) >> 8] : 1.0f) * kUnscale);
            for (; i + 16 <= end; i += 16)
                _mm512_storeu_ps(out + i, _mm512_fmadd_ps(_mm512_loadu_ps(source + i), factor, offset));
            if (i < end) {
                const auto rest = static_cast<__mmask16>((1u << (end - i)) - 1);
                const __m512 scale = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(rest, source + i), factor, offset);
                _mm512_mask_storeu_ps(out + i, rest, scale);
            }
            i = end;
        }
        _mm512_storeu_ps(out + runs, _mm512_setzero_ps());
    }

  private:
    bool per_block() const { return run_shift == block_shift(q); }
    int64_t first_block(int64_t row) const { return (row * q.columns + column) >> block_shift(q); }
};

// The scales of 16 rows, transposed: [run][16 rows], 0 in lanes beyond `rows`.
constexpr int64_t kMostRuns = 256;
inline void transposed_scales(const RowScales& w, int64_t row_begin, int64_t rows, float* out) {
    alignas(64) float scales[16 * (kMostRuns + 16)];
    __m512i transposed[16];
    const int64_t pitch = w.pitch(), valid = rows < 0 ? 0 : smaller(16, rows);
    for (int64_t r = 0; r < valid; ++r) w.begin(row_begin + r, scales + r * pitch);
    for (int64_t r = 0; r < valid; ++r) w.finish(row_begin + r, scales + r * pitch);
    memset(scales + valid * pitch, 0, static_cast<size_t>((16 - valid) * pitch) * sizeof(float));
    for (int64_t i = 0; i < w.runs; i += 16) {
        Simd::transpose_words(reinterpret_cast<const uint8_t*>(scales + i), pitch * 4, transposed);
        for (int64_t j = 0; j < smaller(16, w.runs - i); ++j) _mm512_store_si512(out + 16 * (i + j), transposed[j]);
    }
}

}  // namespace
}  // namespace peftkern
