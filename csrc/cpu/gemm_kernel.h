// One tile of the GEMM engine, for the instruction set whose Simd the including file chose.
//
// For each contraction and each chunk of its depth: pack the tile's rows of X, then stripe by stripe of columns pack W
// (dense or decoded from NF4) into L1/L2 and multiply kRows x kVectors micro-tiles on registers into the fp32
// accumulator. Every element is summed in the same order whatever the tile, so the result is the same on any thread count.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/panel_fp32.h"

namespace peftkern {
namespace {

// Words of depth per chunk: a stripe of 64 columns is 64 KiB, the packed rows of a full tile 0.28 MiB.
constexpr int64_t kChunkWords = 256;
// 64 bytes over a power of two, else all rows would share the same few cache sets (a third of the speed, measured).
constexpr int64_t kPackedStride = kChunkWords + 16;
constexpr int64_t kAccumulatorStride = kTileColumns + 16;

struct Workspace {
    float* accumulator;
    uint32_t* rows;
    uint32_t* stripe;
    uint8_t* staged_codes;
    float* staged_scales;

    static constexpr size_t kAccumulatorBytes = sizeof(float) * kTileRows * kAccumulatorStride;
    static constexpr size_t kRowsBytes = sizeof(uint32_t) * kTileRows * kPackedStride;
    static constexpr size_t kStripeBytes = sizeof(uint32_t) * kChunkWords * Simd::kVectors * Simd::kLanes;

    explicit Workspace(void* memory) {
        auto* p = static_cast<uint8_t*>(memory);
        accumulator = reinterpret_cast<float*>(p);
        rows = reinterpret_cast<uint32_t*>(p += kAccumulatorBytes);
        stripe = reinterpret_cast<uint32_t*>(p += kRowsBytes);
        staged_codes = p += kStripeBytes;
        staged_scales = reinterpret_cast<float*>(p += kStagedCodesBytes);
    }
    static size_t bytes(const Gemm*) {
        return kAccumulatorBytes + kRowsBytes + kStripeBytes + kStagedCodesBytes + kStagedScalesBytes;
    }
};

// c [R, V * lanes] += x [R, words] @ w [words, V * lanes]
template <class Dot, int R, int V>
void multiply(const uint32_t* x, const uint32_t* w, int64_t words, float* c) {
    Simd::F acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Simd::load(c + r * kAccumulatorStride + v * Simd::kLanes);
    for (int64_t k = 0; k < words; ++k, w += V * Simd::kLanes) {
        decltype(Dot::load(w)) column[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) column[v] = Dot::load(w + v * Simd::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const auto row = Dot::broadcast(x + r * kPackedStride + k);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r][v] = Dot::dot(acc[r][v], row, column[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) Simd::store(c + r * kAccumulatorStride + v * Simd::kLanes, acc[r][v]);
}

// The same for any number of rows: as many micro-tiles of `Most` rows as fit, then one with the rest.
template <class Dot, int V, int Most>
struct MultiplyRows {
    template <int R>
    static void rest(int64_t rows, const uint32_t* x, const uint32_t* w, int64_t words, float* c) {
        if constexpr (R > 0) {
            if (rows == R) return multiply<Dot, R, V>(x, w, words, c);
            rest<R - 1>(rows, x, w, words, c);
        }
    }
    static void run(int64_t rows, const uint32_t* x, const uint32_t* w, int64_t words, float* c) {
        for (; rows >= Most; rows -= Most, x += Most * kPackedStride, c += Most * kAccumulatorStride)
            multiply<Dot, Most, V>(x, w, words, c);
        rest<Most - 1>(rows, x, w, words, c);
    }
};

template <class Dot, int V = Simd::kVectors>
void multiply_stripe(int vectors, int64_t rows, const uint32_t* x, const uint32_t* w, int64_t words, float* c) {
    if (vectors == V) return MultiplyRows<Dot, V, V == 1 ? Simd::kNarrowRows : Simd::kRows>::run(rows, x, w, words, c);
    if constexpr (V > 1) multiply_stripe<Dot, V - 1>(vectors, rows, x, w, words, c);
}

template <class Dot>
void contract(const Contraction& c, const Tile& tile, const Workspace& workspace) {
    const int64_t rows = tile.m_end - tile.m_begin;
    constexpr int64_t kStripeColumns = Simd::kVectors * Simd::kLanes;
    static_assert(kChunkWords * Dot::kDepth <= kStagedDepth, "a chunk fits the staging memory");
    StagedCodes staged = {workspace.staged_codes, workspace.staged_scales, 0, 0, 0};
    for (int64_t k = 0; k < c.depth; k += kChunkWords * Dot::kDepth) {
        const int64_t depth = smaller(kChunkWords * Dot::kDepth, c.depth - k), words = divide_up(depth, Dot::kDepth);
        for (int64_t m = 0; m < rows; ++m) Dot::pack_row(c, tile.m_begin + m, k, depth, workspace.rows + m * kPackedStride);
        if (c.nf4 && !c.weight_transposed && aligned(*c.nf4))
            staged.fill(*c.nf4, k, depth, tile.n_begin, tile.n_end - tile.n_begin);
        for (int64_t n = tile.n_begin; n < tile.n_end; n += kStripeColumns) {
            const int64_t columns = smaller(kStripeColumns, tile.n_end - n);
            const int vectors = static_cast<int>(divide_up(columns, Simd::kLanes));
            Dot::pack_stripe(c, staged, k, depth, n, columns, vectors, workspace.stripe);
            float* accumulator = workspace.accumulator + (n - tile.n_begin);
            multiply_stripe<Dot>(vectors, rows, workspace.rows, workspace.stripe, words, accumulator);
        }
    }
    if (c.result_dropout.threshold)
        for (int64_t m = 0; m < rows; ++m)
            apply_dropout(c.result_dropout, tile.m_begin + m, tile.n_begin, tile.n_end - tile.n_begin,
                          workspace.accumulator + m * kAccumulatorStride);
}

inline uint8_t* output_at(const Gemm& g, int64_t row, int64_t column) {
    return static_cast<uint8_t*>(g.out) + (row * g.out_stride + column) * element_bytes(g.out_dtype);
}

// Scales and biases the accumulator and rounds it, once, into the output.
inline void write(const Gemm& g, const Tile& tile, const float* accumulator) {
    const int64_t rows = tile.m_end - tile.m_begin, columns = tile.n_end - tile.n_begin;
    if (g.out_transposed) {
        float column[Simd::kLanes] = {};
        for (int64_t n = 0; n < columns; ++n)
            for (int64_t m = 0; m < rows; m += Simd::kLanes) {
                const int64_t count = smaller(Simd::kLanes, rows - m);
                for (int64_t i = 0; i < count; ++i) column[i] = accumulator[(m + i) * kAccumulatorStride + n];
                uint8_t* p = output_at(g, tile.n_begin + n, tile.m_begin + m);
                store_elements(p, g.out_dtype, count, Simd::load(column));
            }
        return;
    }
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; n += Simd::kLanes) {
            const int64_t column = tile.n_begin + n, count = smaller(Simd::kLanes, columns - n);
            Simd::F v = Simd::load(accumulator + m * kAccumulatorStride + n);
            if (g.column_scale)
                v = v * load_elements(reinterpret_cast<const uint8_t*>(g.column_scale + column), Dtype::kFloat32, count);
            if (g.bias) v = v + load_elements(reinterpret_cast<const uint8_t*>(g.bias + column), Dtype::kFloat32, count);
            store_elements(output_at(g, tile.m_begin + m, column), g.out_dtype, count, v);
        }
}

template <class MainDot>
void run_tile(const Gemm* gemm, const Tile* tile, void* memory) {
    const Workspace workspace(memory);
    const int64_t rows = tile->m_end - tile->m_begin;
    memset(workspace.accumulator, 0, static_cast<size_t>(rows * kAccumulatorStride) * sizeof(float));
    for (int i = 0; i < gemm->contraction_count; ++i) {
        const Contraction& c = gemm->contractions[i];
        if (c.bf16_dot)
            contract<MainDot>(c, *tile, workspace);
        else
            contract<Fp32Dot>(c, *tile, workspace);
    }
    write(*gemm, *tile, workspace.accumulator);
}

}  // namespace
}  // namespace peftkern
