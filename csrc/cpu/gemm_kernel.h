// One tile of the GEMM engine, for the instruction set whose Simd the including file chose.
//
// For each contraction and each chunk of its depth: pack the tile's rows of X, then stripe by stripe of columns pack W
// (dense or decoded from NF4) into L1/L2 and multiply kRows x kVectors micro-tiles on registers into the fp32
// accumulator. Every element is summed in the same order whatever the tile, so the result is the same on any thread
// count.
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

// Rows of a masked term that are computed at once, beside the accumulator: 0.1 MiB.
constexpr int64_t kMaskedRows = 48;

struct Workspace {
    float *accumulator, *masked;
    uint32_t* rows;
    uint32_t* stripe;
    uint8_t* staged_codes;
    float* staged_scales;

    static constexpr size_t kAccumulatorBytes = sizeof(float) * kTileRows * kAccumulatorStride;
    static constexpr size_t kRowsBytes = sizeof(uint32_t) * kTileRows * kPackedStride;
    static constexpr size_t kMaskedBytes = sizeof(float) * kMaskedRows * kAccumulatorStride;
    static constexpr size_t kStripeBytes = sizeof(uint32_t) * kChunkWords * Simd::kVectors * Simd::kLanes;

    explicit Workspace(void* memory) {
        auto* p = static_cast<uint8_t*>(memory);
        accumulator = reinterpret_cast<float*>(p);
        masked = reinterpret_cast<float*>(p += kAccumulatorBytes);
        rows = reinterpret_cast<uint32_t*>(p += kMaskedBytes);
        stripe = reinterpret_cast<uint32_t*>(p += kRowsBytes);
        staged_codes = p += kStripeBytes;
        staged_scales = reinterpret_cast<float*>(p += kStagedCodesBytes);
    }
    static size_t bytes(const Gemm*) {
        return kAccumulatorBytes + kMaskedBytes + kRowsBytes + kStripeBytes + kStagedCodesBytes + kStagedScalesBytes;
    }
};

template <int R, int V>
void load_tile(const float* c, Simd::F (&acc)[R][V]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Simd::load(c + r * kAccumulatorStride + v * Simd::kLanes);
}

template <int R, int V>
void store_tile(float* c, const Simd::F (&acc)[R][V]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) Simd::store(c + r * kAccumulatorStride + v * Simd::kLanes, acc[r][v]);
}

// c [R, V * lanes] += x [R, words] @ w [words, V * lanes]
template <class Dot, int R, int V>
void multiply(const uint32_t* x, const uint32_t* w, int64_t words, float* c) {
    Simd::F acc[R][V];
    load_tile<R, V>(c, acc);
    for (int64_t k = 0; k < words; ++k, w += V * Simd::kLanes) {
        typename Dot::W column[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) column[v] = Dot::load(w + v * Simd::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const auto row = Dot::broadcast(x + r * kPackedStride + k);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r][v] = Dot::dot(acc[r][v], row, column[v]);
        }
    }
    store_tile<R, V>(c, acc);
}

// The same for fewer than R rows.
template <class Dot, int R, int V>
void multiply_rest(int64_t rows, const uint32_t* x, const uint32_t* w, int64_t words, float* c) {
    if constexpr (R > 1) {
        if (rows == R - 1) return multiply<Dot, R - 1, V>(x, w, words, c);
        multiply_rest<Dot, R - 1, V>(rows, x, w, words, c);
    }
}

// The same for any number of rows: full micro-tiles, then one with the rest.
template <class Dot, int V>
void multiply_rows(int64_t rows, const uint32_t* x, const uint32_t* w, int64_t words, float* c) {
    constexpr int R = V == 1 ? Simd::kNarrowRows : Simd::kRows;
    for (; rows >= R; rows -= R, x += R * kPackedStride, c += R * kAccumulatorStride)
        multiply<Dot, R, V>(x, w, words, c);
    multiply_rest<Dot, R, V>(rows, x, w, words, c);
}

template <int V>
struct Constant {
    static constexpr int value = V;
};

// Calls use(integral constant V) for the number of vectors that `columns` columns need.
template <int V = Simd::kVectors, class Use>
void with_vectors(int64_t columns, Use use) {
    if constexpr (V > 1)
        if (columns <= (V - 1) * Simd::kLanes) return with_vectors<V - 1>(columns, use);
    use(Constant<V>());
}

// A stripe of W as [words, V * lanes].
template <class Dot, int V>
void pack_stripe(const Columns& w, uint32_t* stripe) {
    Dot::template columns_of<V>(w, [=](int64_t word, int v, typename Dot::W value) {
        Dot::store(stripe + (word * V + v) * Simd::kLanes, value);
    });
    if (w.c.weight_dropout.threshold)
        for (int64_t k = 0; k < w.depth; ++k)
            apply_dropout(w.c.weight_dropout, w.depth_begin + k, w.begin, w.count,
                          reinterpret_cast<float*>(stripe + k * V * Simd::kLanes));
}

// c [R, V * lanes] += x [R, words] @ V vectors of W's columns, which go from their source to the products in registers:
// with few rows, decoding beside the products is faster than before them.
template <class Dot, int R, int V>
void multiply_columns(const Columns& w, const uint32_t* x, float* c) {
    Simd::F acc[R][V];
    load_tile<R, V>(c, acc);
    Dot::template columns_of<V>(w, [&](int64_t word, int v, typename Dot::W value) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            acc[r][v] = Dot::dot(acc[r][v], Dot::broadcast(x + r * kPackedStride + word), value);
    });
    store_tile<R, V>(c, acc);
}

template <class Dot, int V, int R = V == 1 ? Simd::kNarrowRows : Simd::kRows>
void multiply_few_rows(int64_t rows, const Columns& w, const uint32_t* x, float* c) {
    if (rows == R) return multiply_columns<Dot, R, V>(w, x, c);
    if constexpr (R > 1) multiply_few_rows<Dot, V, R - 1>(rows, w, x, c);
}

template <class Dot>
void contract(const Contraction& c, const Tile& tile, const Workspace& workspace) {
    const int64_t rows = tile.m_end - tile.m_begin;
    // Beyond kRows only one vector of columns fits the registers, and rows of NF4 codes share their table among four.
    const bool few_rows =
        rows <= (c.weight_transposed ? Simd::kNarrowRows : Simd::kRows) && !c.weight_dropout.threshold;
    const int64_t step = few_rows && rows > Simd::kRows ? Simd::kLanes : Simd::kVectors * Simd::kLanes;
    static_assert(kChunkWords * Dot::kDepth <= kStagedDepth, "a chunk fits the staging memory");
    StagedCodes staged = {workspace.staged_codes, workspace.staged_scales, 0, 0, 0};
    for (int64_t k = 0; k < c.depth; k += kChunkWords * Dot::kDepth) {
        const int64_t depth = smaller(kChunkWords * Dot::kDepth, c.depth - k), words = divide_up(depth, Dot::kDepth);
        for (int64_t m = 0; m < rows; ++m)
            Dot::pack_row(c, tile.m_begin + m, k, depth, workspace.rows + m * kPackedStride);
        if (c.nf4 && !c.weight_transposed && aligned(*c.nf4))
            staged.fill(*c.nf4, k, depth, tile.n_begin, tile.n_end - tile.n_begin);
        for (int64_t n = tile.n_begin; n < tile.n_end; n += step) {
            const Columns w = {c, staged, k, depth, n, smaller(step, tile.n_end - n)};
            float* accumulator = workspace.accumulator + (n - tile.n_begin);
            with_vectors(w.count, [&](auto vectors) {
                constexpr int V = decltype(vectors)::value;
                if (few_rows) return multiply_few_rows<Dot, V>(rows, w, workspace.rows, accumulator);
                pack_stripe<Dot, V>(w, workspace.stripe);
                multiply_rows<Dot, V>(rows, workspace.rows, workspace.stripe, words, accumulator);
            });
        }
    }
    if (c.result_dropout.threshold)
        for (int64_t m = 0; m < rows; ++m)
            apply_dropout(c.result_dropout, tile.m_begin + m, tile.n_begin, tile.n_end - tile.n_begin,
                          workspace.accumulator + m * kAccumulatorStride);
}

// The same for a term of which a mask drops results, on a tile that holds others.
template <class Dot>
void contract_masked(const Contraction& c, const Tile& tile, const Workspace& workspace) {
    Workspace part = workspace;
    part.accumulator = workspace.masked;
    for (int64_t begin = tile.m_begin; begin < tile.m_end; begin += kMaskedRows) {
        const int64_t rows = smaller(kMaskedRows, tile.m_end - begin), columns = tile.n_end - tile.n_begin;
        memset(part.accumulator, 0, static_cast<size_t>(rows * kAccumulatorStride) * sizeof(float));
        contract<Dot>(c, {begin, begin + rows, tile.n_begin, tile.n_end}, part);
        for (int64_t m = 0; m < rows; ++m)
            apply_dropout(c.term_dropout, begin + m, tile.n_begin, columns, part.accumulator + m * kAccumulatorStride);
        float* sum = workspace.accumulator + (begin - tile.m_begin) * kAccumulatorStride;
        for (int64_t m = 0; m < rows * kAccumulatorStride; m += kAccumulatorStride)
            for (int64_t n = m; n < m + columns; n += Simd::kLanes)
                Simd::store(sum + n, Simd::load(sum + n) + Simd::load(part.accumulator + n));
    }
}

inline uint8_t* output_at(const Gemm& g, int64_t row, int64_t column) {
    return static_cast<uint8_t*>(g.out) + (row * g.out_stride + column) * element_bytes(g.out_dtype);
}

// Adds bias and residual to the accumulator and rounds it, once, into the output.
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
            if (g.bias)
                v = v + load_elements(reinterpret_cast<const uint8_t*>(g.bias + column), Dtype::kFloat32, count);
            if (g.residual.data)
                v = v + load_elements(element_at(g.residual, tile.m_begin + m, column), g.residual.dtype, count);
            store_elements(output_at(g, tile.m_begin + m, column), g.out_dtype, count, v);
        }
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

struct NoDecode {
    static bool takes(const Contraction&, int64_t) { return false; }
    static void run(const Contraction&, const Tile&, const Workspace&) {}
};

// MainDot multiplies where bf16 may be used; Decode has a faster way for few rows.
template <class MainDot, class Decode = NoDecode>
void run_tile(const Gemm* gemm, const Tile* tile, void* memory) {
    const Workspace workspace(memory);
    const int64_t rows = tile->m_end - tile->m_begin;
    memset(workspace.accumulator, 0, static_cast<size_t>(rows * kAccumulatorStride) * sizeof(float));
    for (int i = 0; i < gemm->contraction_count; ++i) {
        const Contraction& c = gemm->contractions[i];
        if (Decode::takes(c, rows))
            Decode::run(c, *tile, workspace);
        else if (c.bf16_dot)
            contract<MainDot>(c, *tile, workspace);
        else if (c.term_dropout.threshold)
            contract_masked<Fp32Dot>(c, *tile, workspace);
        else
            contract<Fp32Dot>(c, *tile, workspace);
        if (gemm->column_scale && i + 1 == gemm->scaled_count) scale(*gemm, *tile, workspace.accumulator);
    }
    write(*gemm, *tile, workspace.accumulator);
}

}  // namespace
}  // namespace peftkern
