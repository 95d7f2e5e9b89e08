// What the kernels of prefix_attention take. Plain structs only, as in gemm.h: the instruction-set files include this.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/gemm.h"

namespace peftkern {

// [batch, kv_heads, rows, columns] whose last dimension is dense; strides count elements.
struct Heads {
    void* data;
    int64_t batch, head, row;
    Dtype dtype;
};

// One query head of every group of heads that share keys and values, or all of them where `rows` runs over the group.
struct PrefixAttention {
    int64_t batch, kv_heads, rows, head_dim, prefix_length;
    bool per_batch;  // the prefix differs between the elements of the batch
    float scale;
    int64_t chunks;                  // of one prefix's queries, see prefix_chunks
    Heads prefix_key, prefix_value;  // rows: positions of the prefix
    Heads query, out;
    Heads tokens, tokens_lse;  // forward: the attention over the tokens alone; data null: there are none
    Heads lse;                 // of tokens and prefix
    // Backward
    Heads grad_out;
    Heads tokens_grad_query;  // the tokens' part, data null: there are none
    Heads grad_query;         // data null: not wanted
    float* grad_prefix;  // [prefixes, chunks, 2, prefix_length, padded head_dim], added to; the keys' without the scale
};

// [batch, rows, columns], dense.
struct RowsPart {
    const void* data;
    int64_t rows;
};

// out [batch, rows, columns] = the sum of the parts, each the first rows of it, rounded once.
struct SumParts {
    const RowsPart* parts;
    int64_t count, rows, columns;
    void* out;
    Dtype dtype;
};

// Queries are taken in blocks of so many rows: 64 rows of 128 columns in fp32 are 32 KiB.
constexpr int64_t kPrefixRows = 64;
// Rows of the workspace and of grad_prefix are whole vectors of every level.
constexpr int64_t kPrefixPadding = 16;
// A prefix's queries are summed in at most so many chunks, whatever the number of threads.
constexpr int64_t kPrefixChunks = 8;

inline int64_t prefix_padded(int64_t n) {
    return (n + kPrefixPadding - 1) / kPrefixPadding * kPrefixPadding;
}
inline int64_t prefix_blocks(const PrefixAttention& pass) {
    return (pass.rows + kPrefixRows - 1) / kPrefixRows;
}
// How many different prefixes there are, and blocks of queries that share one.
inline int64_t prefix_count(const PrefixAttention& pass) {
    return pass.kv_heads * (pass.per_batch ? pass.batch : 1);
}
inline int64_t prefix_units(const PrefixAttention& pass) {
    return prefix_blocks(pass) * (pass.per_batch ? 1 : pass.batch);
}
inline int64_t prefix_chunks(const PrefixAttention& pass) {
    const int64_t units = prefix_units(pass);
    return units < kPrefixChunks ? units : kPrefixChunks;
}
inline int64_t prefix_workspace_floats(const PrefixAttention& pass) {
    const int64_t rows = prefix_padded(pass.rows < kPrefixRows ? pass.rows : kPrefixRows);
    const int64_t columns = prefix_padded(pass.head_dim);
    return 2 * pass.prefix_length * (columns + rows) + 4 * rows * columns + 3 * rows;
}

// One chunk of the queries of one prefix; `workspace` is 64-byte aligned and holds prefix_workspace_floats.
struct PrefixKernels {
    void (*forward)(const PrefixAttention* pass, int64_t prefix, int64_t chunk, float* workspace);
    void (*backward)(const PrefixAttention* pass, int64_t prefix, int64_t chunk, float* workspace);
    void (*sum_parts)(const SumParts* pass, int64_t row_begin, int64_t row_end);  // of batch * rows
};

extern "C" {
extern const PrefixKernels peftkern_prefix_scalar, peftkern_prefix_avx2, peftkern_prefix_avx512,
    peftkern_prefix_avx512bf16;
}

}  // namespace peftkern
