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

#include "cpu/epilogue_kernel.h"
#include "cpu/gemm.h"
#include "cpu/panel_fp32.h"

namespace peftkern {
namespace {

// Words of depth per chunk: a stripe of 64 columns is 64 KiB, the packed rows of a full tile 0.28 MiB.
constexpr int64_t kChunkWords = 256;
// 64 bytes over a power of two, else all rows would share the same few cache sets (a third of the speed, measured).
constexpr int64_t kPackedStride = kChunkWords + 16;

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

// c [R, V * lanes] += x [R, words] @ w, with x where it lies, its rows `pitch` bytes apart; the next R rows are
// fetched.
template <class Dot, int R, int V>
void multiply_in_place(const uint8_t* x, int64_t pitch, const uint32_t* w, int64_t words, float* c) {
    constexpr int64_t kLine = 16;
    Simd::F acc[R][V];
    load_tile<R, V>(c, acc);
    for (int64_t begin = 0; begin < words; begin += kLine) {
        const int64_t end = smaller(words, begin + kLine);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) __builtin_prefetch(x + (R + r) * pitch + 4 * begin);
        for (int64_t k = begin; k < end; ++k, w += V * Simd::kLanes) {
            typename Dot::W column[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) column[v] = Dot::load(w + v * Simd::kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const auto row = Dot::broadcast(reinterpret_cast<const uint32_t*>(x + r * pitch) + k);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[r][v] = Dot::dot(acc[r][v], row, column[v]);
            }
        }
    }
    store_tile<R, V>(c, acc);
}

template <class Dot, int R, int V>
void multiply_rest_in_place(int64_t rows, const uint8_t* x, int64_t pitch, const uint32_t* w, int64_t words, float* c) {
    if constexpr (R > 1) {
        if (rows == R - 1) return multiply_in_place<Dot, R - 1, V>(x, pitch, w, words, c);
        multiply_rest_in_place<Dot, R - 1, V>(rows, x, pitch, w, words, c);
    }
}

template <class Dot, int V>
void multiply_rows_in_place(int64_t rows, const uint8_t* x, int64_t pitch, const uint32_t* w, int64_t words, float* c) {
    constexpr int R = Simd::kRows;
    for (; rows >= R; rows -= R, x += R * pitch, c += R * kAccumulatorStride)
        multiply_in_place<Dot, R, V>(x, pitch, w, words, c);
    multiply_rest_in_place<Dot, R, V>(rows, x, pitch, w, words, c);
}

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
    Dot::template direct_columns_of<V>(w, [&](int64_t word, int v, typename Dot::W value) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            acc[r][v] = Dot::dot(acc[r][v], Dot::broadcast(x + r * kPackedStride + word), value);
    });
    store_tile<R, V>(c, acc);
}

template <class Dot, int V, int R = V == 1 ? Simd::kNarrowRows : Simd::kRows>
void multiply_columns_rows(int64_t rows, const Columns& w, const uint32_t* x, float* c) {
    if (rows == R) return multiply_columns<Dot, R, V>(w, x, c);
    if constexpr (R > 1) multiply_columns_rows<Dot, V, R - 1>(rows, w, x, c);
}

// Calls use(integral constant V) for as many of the next columns as 4, 2 or 1 vectors take, until there are none: each
// number of vectors costs 8 s of compiling a level, and 3 are as fast as 2 and 1.
template <int V = Simd::kVectors, class Use>
int64_t with_halved_vectors(int64_t columns, Use use) {
    if constexpr (V > 1)
        if (columns <= (V - 1) * Simd::kLanes) return with_halved_vectors<V / 2>(columns, use);
    use(Constant<V>());
    return V * Simd::kLanes;
}

// The accumulator += the packed rows of X @ `all` columns of W, up to `step` at a time.
template <class Dot>
void multiply_few_rows(int64_t rows, const Columns& all, int64_t step, const Workspace& workspace) {
    for (int64_t n = 0; n < all.count;) {
        const int64_t left = smaller(step, all.count - n);
        n += with_halved_vectors(left, [&](auto vectors) {
            constexpr int V = decltype(vectors)::value;
            const Columns w = {all.c,     all.staged,    all.depth_begin,
                               all.depth, all.begin + n, smaller(V * Simd::kLanes, left)};
            multiply_columns_rows<Dot, V>(rows, w, workspace.rows, workspace.accumulator + n);
        });
    }
}

template <class Dot>
void contract(const Contraction& c, const Tile& tile, const Workspace& workspace) {
    const int64_t rows = tile.m_end - tile.m_begin;
    // Beyond kRows only one vector of columns fits the registers, and rows of NF4 codes share their table among four.
    const bool few_rows = rows <= (c.weight_transposed ? Simd::kNarrowRows : Simd::kRows) &&
                          !c.weight_dropout.threshold && Dot::is_direct(c);
    const int64_t step = few_rows && rows > Simd::kRows ? Simd::kLanes : Simd::kVectors * Simd::kLanes;
    static_assert(kChunkWords * Dot::kDepth <= kStagedDepth, "a chunk fits the staging memory");
    StagedCodes staged = {workspace.staged_codes, workspace.staged_scales, 0, 0, 0};
    // Packing rows pays where several stripes share them.
    const bool in_place = !few_rows && tile.n_end - tile.n_begin <= step && Dot::words_in_place(c);
    for (int64_t k = 0; k < c.depth; k += kChunkWords * Dot::kDepth) {
        const int64_t depth = smaller(kChunkWords * Dot::kDepth, c.depth - k), words = divide_up(depth, Dot::kDepth);
        for (int64_t m = 0; m < rows && !in_place; ++m)
            Dot::pack_row(c, tile.m_begin + m, k, depth, workspace.rows + m * kPackedStride);
        if (c.nf4 && !c.weight_transposed && aligned(*c.nf4))
            staged.fill(*c.nf4, k, depth, tile.n_begin, tile.n_end - tile.n_begin);
        if (few_rows) {
            multiply_few_rows<Dot>(rows, {c, staged, k, depth, tile.n_begin, tile.n_end - tile.n_begin}, step,
                                   workspace);
            continue;
        }
        for (int64_t n = tile.n_begin; n < tile.n_end; n += step) {
            const Columns w = {c, staged, k, depth, n, smaller(step, tile.n_end - n)};
            float* accumulator = workspace.accumulator + (n - tile.n_begin);
            with_vectors(w.count, [&](auto vectors) {
                constexpr int V = decltype(vectors)::value;
                pack_stripe<Dot, V>(w, workspace.stripe);
                if (in_place)
                    return multiply_rows_in_place<Dot, V>(rows, element_at(c.x, tile.m_begin, k),
                                                          c.x.stride * element_bytes(c.x.dtype), workspace.stripe,
                                                          words, accumulator);
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

// The same for a term of which runs of rows have weights of their own: each run on its part of the accumulator.
inline void contract_segments(const Contraction& c, const Tile& tile, const Workspace& workspace) {
    for (const Segment* s = c.segments; s != c.segments + c.segment_count; ++s) {
        const int64_t begin = s->begin > tile.m_begin ? s->begin : tile.m_begin, end = smaller(s->end, tile.m_end);
        if (begin >= end) continue;
        Contraction own = c;
        own.depth = s->depth;
        own.weight = s->weight;
        own.x_scale = s->x_scale;
        Workspace part = workspace;
        part.accumulator += (begin - tile.m_begin) * kAccumulatorStride;
        contract<Fp32Dot>(own, {begin, end, tile.n_begin, tile.n_end}, part);
    }
}

// Whether a gemm is one product so shallow that reading and writing its tile in fp32 costs as much as multiplying.
inline bool is_shallow(const Gemm& g, int64_t rows, int64_t chunk_depth) {
    const Contraction& c = g.contractions[0];
    return g.contraction_count == 1 && c.depth <= chunk_depth && !c.nf4 && !c.result_dropout.threshold &&
           !g.column_scale && !g.out_transposed && rows > Simd::kNarrowRows;
}

// Packs as many stripes as the stripe's memory holds, then takes few rows at a time through all of them and, from L1,
// to the output: long runs of few rows, since rows that lie a power of two apart share the same few cache sets.
template <class Dot>
void run_shallow(const Gemm& g, const Tile& tile, const Workspace& workspace) {
    constexpr int R = Simd::kRows, kStep = Simd::kVectors * Simd::kLanes;
    const Contraction& c = g.contractions[0];
    const StagedCodes none = {workspace.staged_codes, workspace.staged_scales, 0, 0, 0};
    const int64_t words = divide_up(c.depth, Dot::kDepth);
    const int64_t stripes = words ? kChunkWords / words : kTileColumns / kStep;
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m)
        Dot::pack_row(c, m, 0, c.depth, workspace.rows + (m - tile.m_begin) * kPackedStride);
    for (int64_t begin = tile.n_begin; begin < tile.n_end; begin += stripes * kStep) {
        const int64_t end = smaller(begin + stripes * kStep, tile.n_end);
        const auto for_each_stripe = [&](auto use) {
            for (int64_t n = begin; n < end; n += kStep)
                with_vectors(smaller(kStep, end - n),
                             [&](auto vectors) { use(n, vectors, workspace.stripe + (n - begin) * words); });
        };
        for_each_stripe([&](int64_t n, auto vectors, uint32_t* stripe) {
            pack_stripe<Dot, decltype(vectors)::value>({c, none, 0, c.depth, n, smaller(kStep, end - n)}, stripe);
        });
        for (int64_t m = tile.m_begin; m < tile.m_end; m += R) {
            const Tile part = {m, smaller(m + R, tile.m_end), begin, end};
            const int64_t rows = part.m_end - m;
            const uint32_t* x = workspace.rows + (m - tile.m_begin) * kPackedStride;
            for (int64_t r = 0; r < rows; ++r)
                memset(workspace.accumulator + r * kAccumulatorStride, 0,
                       sizeof(float) * static_cast<size_t>(divide_up(end - begin, kStep) * kStep));
            for_each_stripe([&](int64_t n, auto vectors, const uint32_t* stripe) {
                multiply_rows<Dot, decltype(vectors)::value>(rows, x, stripe, words, workspace.accumulator + n - begin);
            });
            write(g, part, workspace.accumulator);
        }
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
    const bool bf16 = gemm->contractions[0].bf16_dot;
    if (is_shallow(*gemm, rows, kChunkWords * (bf16 ? MainDot::kDepth : Fp32Dot::kDepth)))
        return bf16 ? run_shallow<MainDot>(*gemm, *tile, workspace) : run_shallow<Fp32Dot>(*gemm, *tile, workspace);
    memset(workspace.accumulator, 0, static_cast<size_t>(rows * kAccumulatorStride) * sizeof(float));
    for (int i = 0; i < gemm->contraction_count; ++i) {
        const Contraction& c = gemm->contractions[i];
        if (c.segments)
            contract_segments(c, *tile, workspace);
        else if (Decode::takes(c, rows))
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
