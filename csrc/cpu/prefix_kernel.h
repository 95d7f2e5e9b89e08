// Attention over a short prefix, merged with the attention over the tokens, for the instruction set whose Simd the
// including file chose. All products are fp32 and of one shape: C [rows, columns] += A [rows, depth] @ B [depth,
// columns].
//
// The tokens are one more key of the softmax: its score is their log-sum-exp and its value their output.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu/exponential.h"
#include "cpu/gemm_kernel.h"
#include "cpu/panel_fp32.h"
#include "cpu/prefix_attention.h"

namespace peftkern {
namespace {

// Element (row, k) of A is data[row * row_stride + k * depth_stride].
struct LeftFactor {
    const float* data;
    int64_t row_stride, depth_stride;
};
struct Block {
    float* data;
    int64_t stride;
};

template <int R, int V>
void multiply_add_tile(const LeftFactor& a, const Block& b, int64_t depth, const Block& c) {
    constexpr int L = Simd::kLanes;
    Simd::F acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Simd::load(c.data + r * c.stride + v * L);
    for (int64_t k = 0; k < depth; ++k) {
        Simd::F columns[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) columns[v] = Simd::load(b.data + k * b.stride + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Simd::F row = Simd::set1(a.data[r * a.row_stride + k * a.depth_stride]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r][v] = Simd::fmadd(row, columns[v], acc[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) Simd::store(c.data + r * c.stride + v * L, acc[r][v]);
}

// The same for up to R rows.
template <int R, int V>
void multiply_add_rows(int64_t rows, const LeftFactor& a, const Block& b, int64_t depth, const Block& c) {
    if constexpr (R > 0) {
        if (rows == R) return multiply_add_tile<R, V>(a, b, depth, c);
        multiply_add_rows<R - 1, V>(rows, a, b, depth, c);
    }
}

// `columns` are whole vectors.
inline void multiply_add(int64_t rows, int64_t columns, int64_t depth, const LeftFactor& a, const Block& b,
                         const Block& c) {
    constexpr int L = Simd::kLanes;
    for (int64_t n = 0; n < columns; n += Simd::kVectors * L)
        with_vectors(columns - n, [&](auto vectors) {
            constexpr int V = decltype(vectors)::value, R = V == 1 ? Simd::kNarrowRows : Simd::kRows;
            const Block right = {b.data + n, b.stride};
            for (int64_t m = 0; m < rows; m += R) {
                const LeftFactor left = {a.data + m * a.row_stride, a.row_stride, a.depth_stride};
                const Block target = {c.data + m * c.stride + n, c.stride};
                multiply_add_rows<R, V>(smaller(R, rows - m), left, right, depth, target);
            }
        });
}

// e^x for x <= 0; 0 where it is below the smallest normal number. NaN stays.
inline Simd::F weight_of(Simd::F x) {
    return x < Simd::set1(-87.0f) ? Simd::zero() : exponential(x);
}

inline uint8_t* row_at(const Heads& heads, int64_t batch, int64_t head, int64_t row) {
    const int64_t index = batch * heads.batch + head * heads.head + row * heads.row;
    return static_cast<uint8_t*>(heads.data) + index * element_bytes(heads.dtype);
}

inline float* number_at(const Heads& heads, int64_t batch, int64_t head, int64_t row) {
    return reinterpret_cast<float*>(row_at(heads, batch, head, row));
}

// Buffers of one thread, in fp32. Rows and columns are padded to whole vectors, the padding holds zeros. Scores stand
// transposed, [prefix_length, rows]: then a vector holds the same key of many queries, and a softmax needs no sums
// across lanes.
struct PrefixBuffers {
    int64_t rows, columns;
    float *key, *value;                // [prefix_length, columns]; key times the scale
    float *query, *grad_out, *result;  // [rows, columns]
    float* transposed;                 // [columns, rows]
    float *scores, *grad_scores;       // [prefix_length, rows]
    float *lse, *top, *sum;            // [rows]

    PrefixBuffers(const PrefixAttention& pass, float* memory)
        : rows(prefix_padded(smaller(pass.rows, kPrefixRows))), columns(prefix_padded(pass.head_dim)) {
        const auto take = [&](int64_t count) {
            float* begin = memory;
            memory += count;
            return begin;
        };
        key = take(pass.prefix_length * columns), value = take(pass.prefix_length * columns);
        query = take(rows * columns), grad_out = take(rows * columns), result = take(rows * columns);
        transposed = take(rows * columns);
        scores = take(pass.prefix_length * rows), grad_scores = take(pass.prefix_length * rows);
        lse = take(rows), top = take(rows), sum = take(rows);
    }

    // c[j, r] = the product of a's row j, [prefix_length, columns], and b's row r, [rows, columns].
    void products(const PrefixAttention& pass, const float* a, const float* b, float* c) const {
        constexpr int L = Simd::kLanes;
        Simd::I words[L];
        for (int64_t r = 0; r < rows; r += L)
            for (int64_t k = 0; k < columns; k += L) {
                Simd::transpose_words(reinterpret_cast<const uint8_t*>(b + r * columns + k), columns * 4, words);
                for (int i = 0; i < L; ++i) Simd::store(transposed + (k + i) * rows + r, Simd::as_floats(words[i]));
            }
        memset(c, 0, static_cast<size_t>(pass.prefix_length * rows) * sizeof(float));
        multiply_add(pass.prefix_length, rows, pass.head_dim, {a, columns, 1}, {transposed, rows}, {c, rows});
    }
};

// Rows of a block are thousands of bytes apart, which the hardware prefetchers do not follow.
constexpr int64_t kRowsAhead = 8;
template <int kForWriting>
void prefetch_row(const Heads& heads, int64_t columns, int64_t batch, int64_t head, int64_t row) {
    const uint8_t* p = row_at(heads, batch, head, row);
    for (int64_t byte = 0; byte < columns * element_bytes(heads.dtype); byte += 64)
        __builtin_prefetch(p + byte, kForWriting, 2);
}

// Rows of `from`, times `factors` where there are some, then zeros up to whole vectors of rows.
inline void load_rows(const PrefixAttention& pass, const Heads& from, int64_t batch, int64_t head, int64_t begin,
                      int64_t count, const float* factors, float* to) {
    const int64_t bytes = element_bytes(from.dtype), columns = prefix_padded(pass.head_dim);
    for (int64_t r = 0; r < count; ++r) {
        prefetch_row<0>(from, pass.head_dim, batch, head, begin + r + kRowsAhead);
        const uint8_t* row = row_at(from, batch, head, begin + r);
        const Simd::F factor = Simd::set1(factors ? factors[r] : 1.0f);
        for (int64_t c = 0; c < columns; c += Simd::kLanes) {
            const bool inside = c < pass.head_dim;
            const Simd::F v =
                inside ? load_elements(row + c * bytes, from.dtype, pass.head_dim - c) * factor : Simd::zero();
            Simd::store(to + r * columns + c, v);
        }
    }
}

inline void load_queries(const PrefixAttention& pass, const Heads& from, int64_t batch, int64_t head, int64_t begin,
                         int64_t count, float* to) {
    const int64_t columns = prefix_padded(pass.head_dim);
    load_rows(pass, from, batch, head, begin, count, nullptr, to);
    memset(to + count * columns, 0, static_cast<size_t>((prefix_padded(count) - count) * columns) * sizeof(float));
}

inline void store_rows(const PrefixAttention& pass, const float* from, const Heads& to, int64_t batch, int64_t head,
                       int64_t begin, int64_t count) {
    const int64_t bytes = element_bytes(to.dtype), columns = prefix_padded(pass.head_dim);
    for (int64_t r = 0; r < count; ++r) {
        prefetch_row<1>(to, pass.head_dim, batch, head, begin + r + kRowsAhead);
        uint8_t* row = row_at(to, batch, head, begin + r);
        for (int64_t c = 0; c < pass.head_dim; c += Simd::kLanes)
            store_elements(row + c * bytes, to.dtype, pass.head_dim - c, Simd::load(from + r * columns + c));
    }
}

// Calls use(buffers, batch, head, first row, rows) for each block of queries of a chunk, with the prefix loaded.
template <class Use>
void for_blocks(const PrefixAttention& pass, int64_t prefix, int64_t chunk, float* workspace, Use use) {
    const int64_t units = prefix_units(pass), blocks = prefix_blocks(pass);
    const int64_t head = prefix % pass.kv_heads, own_batch = prefix / pass.kv_heads;
    PrefixBuffers buffers(pass, workspace);
    load_rows(pass, pass.prefix_key, own_batch, head, 0, pass.prefix_length, nullptr, buffers.key);
    load_rows(pass, pass.prefix_value, own_batch, head, 0, pass.prefix_length, nullptr, buffers.value);
    for (int64_t i = 0; i < pass.prefix_length * buffers.columns; ++i) buffers.key[i] *= pass.scale;
    for (int64_t unit = units * chunk / pass.chunks; unit < units * (chunk + 1) / pass.chunks; ++unit) {
        const int64_t batch = pass.per_batch ? own_batch : unit / blocks;
        const int64_t begin = unit % blocks * kPrefixRows;
        use(buffers, batch, head, begin, smaller(kPrefixRows, pass.rows - begin));
    }
}

// Scores to weights, with buffers.lse the tokens' log-sum-exp on entry and their weight on return.
inline void softmax(const PrefixAttention& pass, const PrefixBuffers& buffers) {
    const int64_t rows = buffers.rows, length = pass.prefix_length;
    for (int64_t r = 0; r < rows; r += Simd::kLanes) {
        float* scores = buffers.scores + r;
        const Simd::F tokens = Simd::load(buffers.lse + r);
        Simd::F top = tokens;
        for (int64_t j = 0; j < length; ++j) {
            const Simd::F s = Simd::load(scores + j * rows);
            top = s > top ? s : top;
        }
        const Simd::F of_tokens = weight_of(tokens - top);
        Simd::F sum = of_tokens;
        for (int64_t j = 0; j < length; ++j) {
            const Simd::F e = weight_of(Simd::load(scores + j * rows) - top);
            Simd::store(scores + j * rows, e);
            sum = sum + e;
        }
        const Simd::F inverse = Simd::set1(1) / sum;
        for (int64_t j = 0; j < length; ++j) Simd::store(scores + j * rows, Simd::load(scores + j * rows) * inverse);
        Simd::store(buffers.lse + r, of_tokens * inverse);
        Simd::store(buffers.top + r, top);
        Simd::store(buffers.sum + r, sum);
    }
}

inline void prefix_forward(const PrefixAttention* arguments, int64_t prefix, int64_t chunk, float* workspace) {
    const PrefixAttention& pass = *arguments;
    for_blocks(pass, prefix, chunk, workspace,
               [&](PrefixBuffers& buffers, int64_t batch, int64_t head, int64_t begin, int64_t count) {
                   const int64_t columns = buffers.columns, rows = buffers.rows = prefix_padded(count);
                   load_queries(pass, pass.query, batch, head, begin, count, buffers.query);
                   buffers.products(pass, buffers.key, buffers.query, buffers.scores);
                   for (int64_t r = 0; r < rows; ++r) {
                       const bool any = pass.tokens.data && r < count;
                       buffers.lse[r] = any ? *number_at(pass.tokens_lse, batch, head, begin + r) : -INFINITY;
                   }
                   softmax(pass, buffers);
                   for (int64_t r = 0; r < count; ++r)
                       *number_at(pass.lse, batch, head, begin + r) = buffers.top[r] + logf(buffers.sum[r]);
                   if (pass.tokens.data)
                       load_rows(pass, pass.tokens, batch, head, begin, count, buffers.lse, buffers.result);
                   else
                       memset(buffers.result, 0, static_cast<size_t>(count * columns) * sizeof(float));
                   multiply_add(count, columns, pass.prefix_length, {buffers.scores, 1, rows}, {buffers.value, columns},
                                {buffers.result, columns});
                   store_rows(pass, buffers.result, pass.out, batch, head, begin, count);
               });
}

// sums[r] = the product of row r of a and of b.
inline void row_products(const PrefixBuffers& buffers, const float* a, const float* b, float* sums) {
    constexpr int L = Simd::kLanes;
    const int64_t columns = buffers.columns;
    alignas(64) float lanes[L][L];
    Simd::I words[L];
    for (int64_t r = 0; r < buffers.rows; r += L) {
        for (int i = 0; i < L; ++i) {
            Simd::F sum = Simd::zero();
            for (int64_t c = (r + i) * columns; c < (r + i + 1) * columns; c += L)
                sum = Simd::fmadd(Simd::load(a + c), Simd::load(b + c), sum);
            Simd::store(lanes[i], sum);
        }
        Simd::transpose_words(reinterpret_cast<const uint8_t*>(lanes), sizeof lanes[0], words);
        Simd::F sum = Simd::as_floats(words[0]);
        for (int i = 1; i < L; ++i) sum = sum + Simd::as_floats(words[i]);
        Simd::store(sums + r, sum);
    }
}

inline void prefix_backward(const PrefixAttention* arguments, int64_t prefix, int64_t chunk, float* workspace) {
    const PrefixAttention& pass = *arguments;
    const int64_t p = pass.prefix_length;
    for_blocks(pass, prefix, chunk, workspace,
               [&](PrefixBuffers& buffers, int64_t batch, int64_t head, int64_t begin, int64_t count) {
                   const int64_t columns = buffers.columns, rows = buffers.rows = prefix_padded(count);
                   load_queries(pass, pass.query, batch, head, begin, count, buffers.query);
                   load_queries(pass, pass.grad_out, batch, head, begin, count, buffers.grad_out);
                   load_queries(pass, pass.out, batch, head, begin, count, buffers.result);
                   buffers.products(pass, buffers.key, buffers.query, buffers.scores);
                   buffers.products(pass, buffers.value, buffers.grad_out, buffers.grad_scores);
                   row_products(buffers, buffers.grad_out, buffers.result, buffers.sum);
                   for (int64_t r = 0; r < rows; ++r)
                       buffers.lse[r] = r < count ? *number_at(pass.lse, batch, head, begin + r) : 0;
                   for (int64_t r = 0; r < rows; r += Simd::kLanes) {
                       const Simd::F lse = Simd::load(buffers.lse + r), delta = Simd::load(buffers.sum + r);
                       for (int64_t j = 0; j < p; ++j) {
                           float *score = buffers.scores + j * rows + r, *grad = buffers.grad_scores + j * rows + r;
                           const Simd::F weight = weight_of(Simd::load(score) - lse);
                           Simd::store(score, weight);
                           Simd::store(grad, weight * (Simd::load(grad) - delta));
                       }
                   }
                   if (pass.grad_prefix) {
                       float* grad_key = pass.grad_prefix + (prefix * pass.chunks + chunk) * 2 * p * columns;
                       multiply_add(p, columns, count, {buffers.grad_scores, rows, 1}, {buffers.query, columns},
                                    {grad_key, columns});
                       multiply_add(p, columns, count, {buffers.scores, rows, 1}, {buffers.grad_out, columns},
                                    {grad_key + p * columns, columns});
                   }
                   if (!pass.grad_query.data) return;
                   if (pass.tokens_grad_query.data)
                       load_rows(pass, pass.tokens_grad_query, batch, head, begin, count, nullptr, buffers.result);
                   else
                       memset(buffers.result, 0, static_cast<size_t>(count * columns) * sizeof(float));
                   multiply_add(count, columns, p, {buffers.grad_scores, 1, rows}, {buffers.key, columns},
                                {buffers.result, columns});
                   store_rows(pass, buffers.result, pass.grad_query, batch, head, begin, count);
               });
}

inline void sum_parts(const SumParts* pass, int64_t row_begin, int64_t row_end) {
    const int64_t bytes = element_bytes(pass->dtype);
    for (int64_t row = row_begin; row < row_end; ++row) {
        const int64_t batch = row / pass->rows, in_batch = row % pass->rows;
        uint8_t* out = static_cast<uint8_t*>(pass->out) + row * pass->columns * bytes;
        for (int64_t c = 0; c < pass->columns; c += Simd::kLanes) {
            const int64_t count = pass->columns - c;
            Simd::F sum = Simd::zero();
            for (int64_t j = 0; j < pass->count; ++j) {
                const RowsPart& part = pass->parts[j];
                if (in_batch >= part.rows) continue;
                const int64_t at = ((batch * part.rows + in_batch) * pass->columns + c) * bytes;
                sum = sum + load_elements(static_cast<const uint8_t*>(part.data) + at, pass->dtype, count);
            }
            store_elements(out + c * bytes, pass->dtype, count, sum);
        }
    }
}

}  // namespace
}  // namespace peftkern
