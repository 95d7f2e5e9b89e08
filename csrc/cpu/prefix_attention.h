// What the kernels of prefix_attention take. Plain structs only, as in gemm.h: the instruction-set files include this.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/gemm.h"

namespace peftkern {

// [batch, heads, rows, columns] whose last dimension is dense; strides count elements.
struct Heads {
    void* data;
    int64_t batch, head, row;
    Dtype dtype;
};

// The leading keys, prefix and tokens, that each query sees: data[batch, head, query] under these strides.
struct VisibleKeys {
    const int32_t* data;
    int64_t batch, head, query;
};

// `group` query heads share the keys and values of a head: they are the rows of one attention, query by query, row r
// being query r / group of head r % group of the group.
struct PrefixAttention {
    int64_t batch, kv_heads, group, queries, keys, head_dim, prefix_length;
    bool per_batch;  // the prefix differs between the elements of the batch
    float scale;
    Heads prefix_key, prefix_value;  // rows: positions of the prefix
    Heads query, key, value;
    Heads mask;  // added to the scores of the tokens; data null: none
    VisibleKeys visible;
    Heads out, lse;
    // Backward
    int64_t chunks;  // of the batch, where its elements share a prefix
    Heads grad_out;
    Heads grad_query, grad_key, grad_value;  // data null: not wanted, and `keys` is 0
    float* grad_prefix;  // [prefixes, chunks, 2, prefix_length, padded head_dim], added to; the keys' without the scale
};

// Rows and columns in the workspace and in grad_prefix are whole vectors of every level.
constexpr int64_t kPrefixPadding = 16;
// Rows for which keys and values are packed once, so that packing costs little and their results stay in L2.
constexpr int64_t kSpanRows = 480;
// The elements of the batch that share a prefix are summed in at most so many chunks, whatever the number of threads.
constexpr int64_t kPrefixChunks = 8;

inline int64_t prefix_padded(int64_t n) {
    return (n + kPrefixPadding - 1) / kPrefixPadding * kPrefixPadding;
}
inline int64_t prefix_rows(const PrefixAttention& pass) {
    return pass.group * pass.queries;
}
inline int64_t prefix_spans(const PrefixAttention& pass) {
    return (prefix_rows(pass) + kSpanRows - 1) / kSpanRows;
}
// How many different prefixes there are.
inline int64_t prefix_count(const PrefixAttention& pass) {
    return pass.kv_heads * (pass.per_batch ? pass.batch : 1);
}

// `memory` is 64-byte aligned and has the bytes of the pass.
struct PrefixKernels {
    // One span of rows of one batch element and head of keys: item (batch * kv_heads + head) * spans + span.
    void (*forward)(const PrefixAttention* pass, int64_t item, void* memory);
    size_t (*forward_bytes)(const PrefixAttention* pass);
    // One chunk of the batch for one prefix: item prefix * chunks + chunk.
    void (*backward)(const PrefixAttention* pass, int64_t item, void* memory);
    size_t (*backward_bytes)(const PrefixAttention* pass);
};

extern "C" {
PEFTKERN_KERNELS PrefixKernels peftkern_prefix_scalar, peftkern_prefix_avx2, peftkern_prefix_avx512,
    peftkern_prefix_avx512bf16;
}

}  // namespace peftkern
