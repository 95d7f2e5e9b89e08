// Passes over activations beside the products, for the instruction set whose Simd the including file chose.
#pragma once

#include <stdint.h>

#include "cpu/gemm.h"
#include "cpu/panel_fp32.h"

namespace peftkern {
namespace {

inline void split_dropout(const SplitDropout* pass, int64_t row_begin, int64_t row_end) {
    // Whole Philox calls of every level; a vector's overhang follows.
    constexpr int64_t kChunk = 256;
    alignas(64) float kept[kChunk + Simd::kLanes];
    const int64_t bytes = element_bytes(pass->x.dtype);
    for (int64_t row = row_begin; row < row_end; ++row)
        for (int64_t begin = 0; begin < pass->columns; begin += kChunk) {
            const int64_t count = smaller(kChunk, pass->columns - begin);
            const uint8_t* x = element_at(pass->x, row, begin);
            for (int64_t c = 0; c < count; c += Simd::kLanes)
                Simd::store(kept + c, load_elements(x + c * bytes, pass->x.dtype, count - c));
            apply_dropout(pass->dropout, row, begin, count, kept);
            const int64_t at = (row * pass->out_stride + begin) * bytes;
            for (int64_t c = 0; c < count; c += Simd::kLanes) {
                const int64_t valid = smaller(Simd::kLanes, count - c);
                const Simd::F k = Simd::load(kept + c);
                if (pass->rest) {
                    const Simd::F rest = load_elements(x + c * bytes, pass->x.dtype, valid) - k;
                    store_elements(static_cast<uint8_t*>(pass->rest) + at + c * bytes, pass->x.dtype, valid, rest);
                }
                if (pass->kept)
                    store_elements(static_cast<uint8_t*>(pass->kept) + at + c * bytes, pass->x.dtype, valid, k);
            }
        }
}

inline void scale_columns(const ScaleColumns* pass, int64_t column_begin, int64_t column_end) {
    constexpr int L = Simd::kLanes;
    alignas(64) float factors[kTileColumns + L] = {}, sums[kTileColumns + L] = {};
    const int64_t count = column_end - column_begin, bytes = element_bytes(pass->grad_y.dtype);
    for (int64_t c = 0; c < count; ++c) factors[c] = pass->scale[column_begin + c] - pass->shift;
    for (int64_t row = 0; row < pass->rows; ++row) {
        const uint8_t* grad_y = element_at(pass->grad_y, row, column_begin);
        uint8_t* grad_x = static_cast<uint8_t*>(pass->grad_x) + (row * pass->grad_x_stride + column_begin) * bytes;
        for (int64_t c = 0; c < count; c += L) {
            const int64_t valid = smaller(L, count - c);
            const Simd::F g = load_elements(grad_y + c * bytes, pass->grad_y.dtype, valid);
            if (pass->grad_scale) {
                const Simd::F x = load_elements(element_at(pass->x, row, column_begin + c), pass->x.dtype, valid);
                Simd::store(sums + c, Simd::fmadd(g, x, Simd::load(sums + c)));
            }
            if (pass->grad_x)
                store_elements(grad_x + c * bytes, pass->grad_y.dtype, valid, g * Simd::load(factors + c));
        }
    }
    if (pass->grad_scale)
        for (int64_t c = 0; c < count; ++c) pass->grad_scale[column_begin + c] = sums[c];
}

// Sums stay in registers, V vectors of columns at a time.
template <int V>
void sum_columns(const SumRows* pass, int64_t row, int64_t column, int64_t count) {
    constexpr int L = Simd::kLanes;
    Simd::F sums[V];
    for (int v = 0; v < V; ++v) sums[v] = Simd::zero();
    for (int64_t i = pass->offsets[row]; i < pass->offsets[row + 1]; ++i) {
        const uint8_t* from = element_at(pass->rows, pass->index[i], column);
        const int64_t bytes = element_bytes(pass->rows.dtype);
        for (int v = 0; v < V; ++v)
            sums[v] = sums[v] + load_elements(from + v * L * bytes, pass->rows.dtype, count - v * L);
    }
    const int64_t bytes = element_bytes(pass->out_dtype);
    uint8_t* to = static_cast<uint8_t*>(pass->out) + (row * pass->columns + column) * bytes;
    for (int v = 0; v < V; ++v) store_elements(to + v * L * bytes, pass->out_dtype, count - v * L, sums[v]);
}

inline void sum_rows(const SumRows* pass, int64_t row_begin, int64_t row_end) {
    constexpr int kWide = 8;
    for (int64_t row = row_begin; row < row_end; ++row) {
        int64_t column = 0;
        for (; column + kWide * Simd::kLanes <= pass->columns; column += kWide * Simd::kLanes)
            sum_columns<kWide>(pass, row, column, kWide * Simd::kLanes);
        for (; column < pass->columns; column += Simd::kLanes)
            sum_columns<1>(pass, row, column, pass->columns - column);
    }
}

}  // namespace
}  // namespace peftkern
