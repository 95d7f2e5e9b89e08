// What becomes of a tile's fp32 sums: scale, bias, residual, one rounding into the output.
#pragma once

#include <stdint.h>

#include "cpu/gemm.h"
#include "cpu/panel_fp32.h"

namespace peftkern {
namespace {

// Floats between the accumulator's rows: 64 bytes over a power of two.
constexpr int64_t kAccumulatorStride = kTileColumns + 16;

template <auto V>
struct Constant {
    static constexpr auto value = V;
};

inline uint8_t* output_at(const Gemm& g, int64_t row, int64_t column) {
    return static_cast<uint8_t*>(g.out) + (row * g.out_stride + column) * element_bytes(g.out_dtype);
}

struct Variable {
    Dtype value;
};

template <class OutDtype, class AddedDtype>
void write_rows(const Gemm& g, const Tile& tile, const float* accumulator, OutDtype out, AddedDtype added) {
    const int64_t rows = tile.m_end - tile.m_begin, columns = tile.n_end - tile.n_begin;
    for (int64_t m = 0; m < rows; ++m) {
        const auto write_vector = [&](int64_t n, int64_t count) {
            const int64_t column = tile.n_begin + n;
            Simd::F v = Simd::load(accumulator + m * kAccumulatorStride + n);
            if (g.bias)
                v = v + load_elements(reinterpret_cast<const uint8_t*>(g.bias + column), Dtype::kFloat32, count);
            if (g.residual.data)
                v = v + load_elements(element_at(g.residual, tile.m_begin + m, column), added.value, count);
            store_elements(output_at(g, tile.m_begin + m, column), out.value, count, v);
        };
        int64_t n = 0;
        for (; n + Simd::kLanes <= columns; n += Simd::kLanes) write_vector(n, Simd::kLanes);
        if (n < columns) write_vector(n, columns - n);
    }
}

// Adds bias and residual to the accumulator and rounds it, once, into the output.
inline void write(const Gemm& g, const Tile& tile, const float* accumulator) {
    const int64_t rows = tile.m_end - tile.m_begin, columns = tile.n_end - tile.n_begin;
    if (g.out_transposed) {
        // Blocks reach behind the tile's last row and column, where the workspace goes on.
        constexpr int L = Simd::kLanes;
        Simd::I block[L];
        for (int64_t n = 0; n < columns; n += L)
            for (int64_t m = 0; m < rows; m += L) {
                const float* from = accumulator + m * kAccumulatorStride + n;
                Simd::transpose_words(reinterpret_cast<const uint8_t*>(from), sizeof(float) * kAccumulatorStride,
                                      block);
                for (int64_t i = 0; i < smaller(L, columns - n); ++i)
                    store_elements(output_at(g, tile.n_begin + n + i, tile.m_begin + m), g.out_dtype,
                                   smaller(L, rows - m), Simd::as_floats(block[i]));
            }
        return;
    }
    // The dtypes as constants, else their choice costs more than the rest.
    const Dtype added = g.residual.data ? g.residual.dtype : g.out_dtype;
    if (g.out_dtype == Dtype::kBFloat16 && added == Dtype::kBFloat16)
        return write_rows(g, tile, accumulator, Constant<Dtype::kBFloat16>(), Constant<Dtype::kBFloat16>());
    if (g.out_dtype == Dtype::kFloat32 && added == Dtype::kFloat32)
        return write_rows(g, tile, accumulator, Constant<Dtype::kFloat32>(), Constant<Dtype::kFloat32>());
    write_rows(g, tile, accumulator, Variable{g.out_dtype}, Variable{added});
}

// Keeps the sum of the leading contractions if asked to, and scales it.
inline void scale(const Gemm& g, const Tile& tile, float* accumulator) {
    const int64_t rows = tile.m_end - tile.m_begin, columns = tile.n_end - tile.n_begin;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; n += Simd::kLanes) {
            const int64_t column = tile.n_begin + n, count = smaller(Simd::kLanes, columns - n);
            float* p = accumulator + m * kAccumulatorStride + n;
            const Simd::F v = Simd::load(p);
            if (g.sum_out) {
                const int64_t at = ((tile.m_begin + m) * g.out_stride + column) * element_bytes(g.out_dtype);
                store_elements(static_cast<uint8_t*>(g.sum_out) + at, g.out_dtype, count, v);
            }
            const auto* s = reinterpret_cast<const uint8_t*>(g.column_scale + column);
            Simd::store(p, v * load_elements(s, Dtype::kFloat32, count));
        }
}

}  // namespace
}  // namespace peftkern
