// Attention over a prefix and tokens, backward, for the instruction set whose Simd the including file chose: the
// weights are computed again from the log-sum-exp, block of rows by block of keys (arXiv 2205.14135).
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu/prefix_kernel.h"

namespace peftkern {
namespace {

// Rows and keys of a block: its scores, their gradients and what they multiply stay in L2.
constexpr int64_t kBackwardRows = 96, kBackwardKeys = 128;

// Buffers of one thread. Keys and their gradients are those of a whole attention.
template <class Dot>
struct BackwardBuffers {
    HeadSizes<Dot> sizes;
    int64_t scores_pitch, rows_pitch;
    uint32_t *staged, *key_stripes, *value_stripes, *key_pairs;
    uint32_t *queries, *grad_outs, *query_pairs, *grad_out_pairs;
    uint32_t *weights, *grads, *grad_rows;  // pairs, pairs, rows
    float *scores, *grad_scores, *grad_query, *grad_key, *grad_value, *lse, *delta;
    int64_t *visible, *first;
    size_t bytes;

    BackwardBuffers(const PrefixAttention& pass, void* memory) : sizes(pass) {
        const int64_t total = pass.prefix_length + pass.keys, keys = divide_up(total, kStripe) * kStripe;
        const int64_t rows = smaller(kBackwardRows, prefix_padded(prefix_rows(pass)));
        const int64_t block = smaller(kBackwardKeys, prefix_padded(total)), pairs = divide_up(rows, Dot::kDepth);
        scores_pitch = block + kPrefixPadding;
        rows_pitch = Dot::kDepth == 1 ? scores_pitch : prefix_padded(divide_up(block, Dot::kDepth)) + kPrefixPadding;
        Parts parts(memory);
        parts.take(staged, kStripe * sizes.pitch);
        parts.take(key_stripes, keys * sizes.words), parts.take(value_stripes, keys * sizes.words);
        parts.take(key_pairs, divide_up(keys, Dot::kDepth) * sizes.columns_pitch);
        parts.take(queries, rows * sizes.pitch), parts.take(grad_outs, rows * sizes.pitch);
        parts.take(query_pairs, pairs * sizes.columns_pitch), parts.take(grad_out_pairs, pairs * sizes.columns_pitch);
        parts.take(scores, rows * scores_pitch), parts.take(grad_scores, rows * scores_pitch);
        if (Dot::kDepth == 1) {  // in place
            weights = reinterpret_cast<uint32_t*>(scores);
            grads = grad_rows = reinterpret_cast<uint32_t*>(grad_scores);
        } else {
            parts.take(weights, pairs * scores_pitch), parts.take(grads, pairs * scores_pitch);
            parts.take(grad_rows, rows * rows_pitch);
        }
        parts.take(grad_query, rows * sizes.columns_pitch);
        parts.take(grad_key, total * sizes.columns_pitch), parts.take(grad_value, total * sizes.columns_pitch);
        parts.take(lse, rows), parts.take(delta, rows), parts.take(visible, rows), parts.take(first, block);
        bytes = parts.bytes();
    }
};

template <class Dot>
struct Backward {
    static constexpr int L = Simd::kLanes;
    const PrefixAttention& pass;
    const BackwardBuffers<Dot> buffers;
    int64_t batch, head;

    int64_t total() const { return pass.prefix_length + pass.keys; }

    // delta and the log-sum-exp of the rows [begin, begin + count).
    void load_sums(int64_t begin, int64_t count) const {
        alignas(64) float lanes[L][L] = {};
        for (int64_t r = 0; r < count; r += L) {
            for (int64_t i = r; i < smaller(r + L, count); ++i) {
                const int64_t query = (begin + i) / pass.group, of = head * pass.group + (begin + i) % pass.group;
                const uint8_t* grad_out = row_at(pass.grad_out, batch, of, query);
                const uint8_t* out = row_at(pass.out, batch, of, query);
                Simd::F sum = Simd::zero();
                for (int64_t c = 0; c < pass.head_dim; c += L) {
                    const int64_t columns = pass.head_dim - c;
                    sum = Simd::fmadd(
                        load_elements(grad_out + c * element_bytes(pass.grad_out.dtype), pass.grad_out.dtype, columns),
                        load_elements(out + c * element_bytes(pass.out.dtype), pass.out.dtype, columns), sum);
                }
                Simd::store(lanes[i - r], sum);
                buffers.lse[i] = *number_at(pass.lse, batch, of, query) * kLog2E;
            }
            Simd::store(buffers.delta + r, across(lanes, sum_of));
        }
    }

    // Scores and grad_scores of kDepth rows from `row` of the block to their weights and gradients.
    void differentiate(int64_t begin, int64_t row, int64_t count, int64_t key_begin, int64_t end) const {
        constexpr int D = Dot::kDepth;
        const int64_t pitch = buffers.scores_pitch;
        Simd::F lse[D], delta[D];
        int64_t visible[D];
        for (int i = 0; i < D; ++i) {
            const int64_t seen = row + i < count ? smaller(end, buffers.visible[row + i] - key_begin) : 0;
            visible[i] = seen < 0 ? 0 : seen;
            lse[i] = delta[i] = Simd::zero();
            if (visible[i] == 0) continue;
            scale_scores(pass, batch, head, begin + row + i, key_begin, visible[i], buffers.scores + (row + i) * pitch);
            lse[i] = Simd::set1(buffers.lse[row + i]);
            delta[i] = Simd::set1(buffers.delta[row + i]);
        }
        for (int64_t c = 0; c < end; c += L) {
            Simd::F weight[D], grad[D];
#pragma GCC unroll 2
            for (int i = 0; i < D; ++i) {
                weight[i] = grad[i] = Simd::zero();
                if (c < visible[i]) {
                    const int64_t at = (row + i) * pitch + c;
                    weight[i] = power_of_two(Simd::load(buffers.scores + at) - lse[i]);
                    grad[i] = weight[i] * (Simd::load(buffers.grad_scores + at) - delta[i]);
                }
                if constexpr (D > 1)
                    Dot::store_elements(buffers.grad_rows + (row + i) * buffers.rows_pitch + c / D, grad[i]);
            }
            Dot::store(buffers.weights + row / D * pitch + c, Dot::words_of(weight));
            Dot::store(buffers.grads + row / D * pitch + c, Dot::words_of(grad));
        }
    }

    // The block's rows [begin, begin + count) against the keys.
    void block(int64_t begin, int64_t count, Range keys) const {
        const HeadSizes<Dot>& sizes = buffers.sizes;
        const int64_t pitch = buffers.scores_pitch, columns_pitch = sizes.columns_pitch;
        const int64_t end = smaller(largest(buffers.visible, count), keys.end) - keys.begin;
        // The first row that sees a key.
        for (int64_t j = 0, row = 0; j < end; ++j) {
            while (buffers.visible[row] <= keys.begin + j) ++row;
            buffers.first[j] = row;
        }
        const auto scores = [&](const uint32_t* rows, const uint32_t* stripes, float* to) {
            for (int64_t n = 0; n < end; n += kStripe) {
                const int64_t first = buffers.first[n];
                multiply_panel<Dot>(
                    count - first, smaller(kStripe, end - n), {rows + first * sizes.pitch, sizes.pitch, 1},
                    {stripes + (keys.begin + n) * sizes.words, kStripe}, false, {to + first * pitch + n, pitch},
                    [&](int64_t, int64_t) { return Range{0, sizes.words}; });
            }
        };
        scores(buffers.queries, buffers.key_stripes, buffers.scores);
        scores(buffers.grad_outs, buffers.value_stripes, buffers.grad_scores);
        for (int64_t r = 0; r < count; r += Dot::kDepth) differentiate(begin, r, count, keys.begin, end);

        const int64_t row_words = divide_up(count, Dot::kDepth);
        const auto over_rows = [&](const uint32_t* grads, const uint32_t* rows, float* to) {
            multiply_panel<Dot>(end, sizes.columns, {grads, 1, pitch}, {rows, columns_pitch}, true,
                                {to + keys.begin * columns_pitch, columns_pitch},
                                [&](int64_t m, int64_t) { return Range{buffers.first[m] / Dot::kDepth, row_words}; });
        };
        over_rows(buffers.weights, buffers.grad_out_pairs, buffers.grad_value);
        over_rows(buffers.grads, buffers.query_pairs, buffers.grad_key);
        if (!pass.grad_query.data) return;
        multiply_panel<Dot>(count, sizes.columns, {buffers.grad_rows, buffers.rows_pitch, 1},
                            {buffers.key_pairs + keys.begin / Dot::kDepth * columns_pitch, columns_pitch},
                            keys.begin > 0, {buffers.grad_query, columns_pitch}, [&](int64_t m, int64_t rows) {
                                const int64_t seen = smaller(end, largest(buffers.visible + m, rows) - keys.begin);
                                return Range{0, seen > 0 ? divide_up(seen, Dot::kDepth) : 0};
                            });
    }

    void rows(int64_t begin, int64_t count) const {
        const HeadSizes<Dot>& sizes = buffers.sizes;
        visible_of(pass, batch, head, begin, count, buffers.visible);
        pack_queries<Dot>(pass, pass.query, batch, head, begin, count, buffers.queries);
        pack_queries<Dot>(pass, pass.grad_out, batch, head, begin, count, buffers.grad_outs);
        rows_to_pairs<Dot>(buffers.queries, sizes.pitch, count, pass.head_dim, buffers.query_pairs,
                           sizes.columns_pitch);
        rows_to_pairs<Dot>(buffers.grad_outs, sizes.pitch, count, pass.head_dim, buffers.grad_out_pairs,
                           sizes.columns_pitch);
        load_sums(begin, count);
        const int64_t seen = largest(buffers.visible, count);
        for (int64_t key = 0; key < seen; key += kBackwardKeys)
            block(begin, count, {key, smaller(key + kBackwardKeys, seen)});
        if (!pass.grad_query.data) return;
        const auto bytes = static_cast<size_t>(count * sizes.columns_pitch) * sizeof(float);
        if (seen == 0) memset(buffers.grad_query, 0, bytes);
        for (int64_t r = 0; r < count; ++r) {
            prefetch_query<1>(pass, pass.grad_query, batch, head, begin + r + kRowsAhead);
            store_row(pass, buffers.grad_query + r * sizes.columns_pitch, pass.scale, pass.grad_query, batch,
                      head * pass.group + (begin + r) % pass.group, (begin + r) / pass.group);
        }
    }

    // All rows; then the tokens' gradients are stored and the prefix's added to what it has of other batch elements.
    void attention(float* grad_prefix) const {
        const HeadSizes<Dot>& sizes = buffers.sizes;
        pack_keys<Dot>(pass, pass.prefix_key, pass.key, batch, head, {0, total()}, buffers.staged, buffers.key_stripes,
                       buffers.key_pairs);
        pack_keys<Dot>(pass, pass.prefix_value, pass.value, batch, head, {0, total()}, buffers.staged,
                       buffers.value_stripes, nullptr);
        const auto bytes = static_cast<size_t>(total() * sizes.columns_pitch) * sizeof(float);
        memset(buffers.grad_key, 0, bytes);
        memset(buffers.grad_value, 0, bytes);
        for (int64_t m = 0; m < prefix_rows(pass); m += kBackwardRows)
            rows(m, smaller(kBackwardRows, prefix_rows(pass) - m));
        for (int64_t j = 0; j < pass.prefix_length && grad_prefix; ++j)
            for (int64_t c = 0; c < sizes.columns; c += L) {
                float *key = grad_prefix + j * sizes.columns + c, *value = key + pass.prefix_length * sizes.columns;
                const int64_t at = j * sizes.columns_pitch + c;
                Simd::store(key, Simd::load(key) + Simd::load(buffers.grad_key + at));
                Simd::store(value, Simd::load(value) + Simd::load(buffers.grad_value + at));
            }
        for (int64_t j = 0; j < pass.keys; ++j) {
            const int64_t at = (pass.prefix_length + j) * sizes.columns_pitch;
            store_row(pass, buffers.grad_key + at, pass.scale, pass.grad_key, batch, head, j);
            store_row(pass, buffers.grad_value + at, 1, pass.grad_value, batch, head, j);
        }
    }
};

template <class Dot>
void backward_item(const PrefixAttention& pass, int64_t item, void* memory) {
    const BackwardBuffers<Dot> buffers(pass, memory);
    const int64_t prefix = item / pass.chunks, chunk = item % pass.chunks;
    const int64_t head = prefix % pass.kv_heads, own = prefix / pass.kv_heads;
    const int64_t begin = pass.per_batch ? own : pass.batch * chunk / pass.chunks;
    const int64_t end = pass.per_batch ? own + 1 : pass.batch * (chunk + 1) / pass.chunks;
    float* grad_prefix =
        pass.grad_prefix ? pass.grad_prefix + item * 2 * pass.prefix_length * buffers.sizes.columns : nullptr;
    for (int64_t batch = begin; batch < end; ++batch) Backward<Dot>{pass, buffers, batch, head}.attention(grad_prefix);
}

template <class Bf16>
void prefix_backward(const PrefixAttention* pass, int64_t item, void* memory) {
    if (pass->query.dtype == Dtype::kBFloat16) return backward_item<Bf16>(*pass, item, memory);
    backward_item<Fp32Dot>(*pass, item, memory);
}
template <class Bf16>
size_t prefix_backward_bytes(const PrefixAttention* pass) {
    if (pass->query.dtype == Dtype::kBFloat16) return BackwardBuffers<Bf16>(*pass, nullptr).bytes;
    return BackwardBuffers<Fp32Dot>(*pass, nullptr).bytes;
}

}  // namespace
}  // namespace peftkern
