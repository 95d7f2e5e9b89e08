// Attention over a prefix and tokens, forward, for the instruction set whose Simd the including file chose: blocks of
// rows against blocks of keys, of which the prefix is the first, with an online softmax (arXiv 2205.14135). Exponents
// are of base 2, so that scores carry a factor log2(e).
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu/exponential.h"
#include "cpu/panel_fp32.h"
#include "cpu/prefix_attention.h"
#include "cpu/prefix_tiles.h"

namespace peftkern {
namespace {

// Rows of a block: whole tiles of kRows and whole vectors at every level.
constexpr int64_t kQueryRows = 48;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
// Where the largest score begins: finite, so that rows whose first keys are all hidden have weights 0, not NaN.
constexpr float kNoScore = -3e38f;

// What the rows [begin, begin + count) of an attention see.
inline void visible_of(const PrefixAttention& pass, int64_t batch, int64_t head, int64_t begin, int64_t count,
                       int64_t* visible) {
    const VisibleKeys& v = pass.visible;
    for (int64_t r = begin; r < begin + count; ++r)
        visible[r - begin] =
            v.data[batch * v.batch + (head * pass.group + r % pass.group) * v.head + r / pass.group * v.query];
}

inline int64_t largest(const int64_t* values, int64_t count) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = values[i] > most ? values[i] : most;
    return most;
}

// combine(.., combine(v[0], v[1])) of the lanes of each of kLanes vectors.
template <class Combine>
Simd::F across(const float (&vectors)[Simd::kLanes][Simd::kLanes], Combine combine) {
    Simd::I words[Simd::kLanes];
    Simd::transpose_words(reinterpret_cast<const uint8_t*>(vectors), sizeof vectors[0], words);
    Simd::F result = Simd::as_floats(words[0]);
    for (int i = 1; i < Simd::kLanes; ++i) result = combine(result, Simd::as_floats(words[i]));
    return result;
}

inline Simd::F larger(Simd::F a, Simd::F b) {
    return a > b ? a : b;
}
inline Simd::F sum_of(Simd::F a, Simd::F b) {
    return a + b;
}

// One row's scores of the keys from key_begin on, of which it sees `visible`: scaled, with the mask added where there
// is one, -infinity behind the last up to the end of a vector.
inline void scale_scores(const PrefixAttention& pass, int64_t batch, int64_t head, int64_t row, int64_t key_begin,
                         int64_t visible, float* scores) {
    constexpr int L = Simd::kLanes;
    const Simd::F factor = Simd::set1(pass.scale * kLog2E);
    for (int64_t c = 0; c < visible; c += L) Simd::store(scores + c, Simd::load(scores + c) * factor);
    if (pass.mask.data) {
        const uint8_t* mask = row_at(pass.mask, batch, head * pass.group + row % pass.group, row / pass.group);
        const int64_t bytes = element_bytes(pass.mask.dtype), before = pass.prefix_length - key_begin;
        for (int64_t c = before > 0 ? before : 0; c < visible; c += L) {
            const Simd::F added = load_elements(mask + (c - before) * bytes, pass.mask.dtype, visible - c);
            Simd::store(scores + c, Simd::fmadd(added, Simd::set1(kLog2E), Simd::load(scores + c)));
        }
    }
    for (int64_t c = visible; c % L; ++c) scores[c] = -INFINITY;
}

// Buffers of one thread. Rows of scores are kLanes longer than a block of keys, for a mask's last vector.
template <class Dot>
struct ForwardBuffers {
    static constexpr int64_t kKeys = 256 * Dot::kDepth;
    HeadSizes<Dot> sizes;
    int64_t keys, scores_pitch, weights_pitch, span;
    uint32_t *staged, *key_stripes, *value_pairs, *queries, *weights;
    float *scores, *out, *top, *sum;
    int64_t* visible;
    size_t bytes;

    ForwardBuffers(const PrefixAttention& pass, void* memory) : sizes(pass) {
        keys = smaller(kKeys, divide_up(pass.prefix_length + pass.keys, kStripe) * kStripe);
        scores_pitch = prefix_padded(keys) + kPrefixPadding;
        weights_pitch = Dot::kDepth == 1 ? scores_pitch : prefix_padded(keys / Dot::kDepth) + kPrefixPadding;
        const int64_t rows = smaller(kQueryRows, prefix_padded(prefix_rows(pass)));
        span = divide_up(divide_up(prefix_rows(pass), prefix_spans(pass)), kQueryRows) * kQueryRows;
        Parts parts(memory);
        parts.take(staged, kStripe * sizes.pitch);
        parts.take(key_stripes, keys * sizes.words);
        parts.take(value_pairs, divide_up(keys, Dot::kDepth) * sizes.columns_pitch);
        parts.take(queries, rows * sizes.pitch);
        parts.take(scores, rows * scores_pitch);
        if (Dot::kDepth == 1)
            weights = reinterpret_cast<uint32_t*>(scores);  // in place
        else
            parts.take(weights, rows * weights_pitch);
        parts.take(out, smaller(span, prefix_padded(prefix_rows(pass))) * sizes.columns_pitch);
        parts.take(top, span), parts.take(sum, span), parts.take(visible, span);
        bytes = parts.bytes();
    }
};

template <class Dot>
struct Forward {
    static constexpr int L = Simd::kLanes;
    const PrefixAttention& pass;
    const ForwardBuffers<Dot> buffers;
    int64_t batch, head, row_begin;  // of the span

    // Weights of the rows [begin, begin + count), at most kLanes, of the span for the keys from key_begin on, of which
    // `end` are computed; what they gave for earlier keys is scaled to the new maximum.
    void softmax(int64_t begin, int64_t count, int64_t key_begin, int64_t end, float* scores, uint32_t* weights) const {
        alignas(64) float lanes[L][L] = {};
        alignas(64) float tops[L], rescale[L];
        int64_t visible[L];
        for (int64_t i = 0; i < count; ++i) {
            float* row = scores + i * buffers.scores_pitch;
            visible[i] = smaller(end, buffers.visible[begin + i] - key_begin);
            Simd::F top = Simd::set1(-INFINITY);
            if (visible[i] > 0) scale_scores(pass, batch, head, row_begin + begin + i, key_begin, visible[i], row);
            for (int64_t c = 0; c < visible[i]; c += L) top = larger(Simd::load(row + c), top);
            Simd::store(lanes[i], top);
        }
        const Simd::F before = Simd::load(buffers.top + begin), top = larger(across(lanes, larger), before);
        const Simd::F scale = power_of_two(before - top);
        Simd::store(tops, top);
        Simd::store(rescale, scale);
        Simd::store(buffers.top + begin, top);
        for (int64_t i = 0; i < count; ++i) {
            const float* row = scores + i * buffers.scores_pitch;
            uint32_t* to = weights + i * buffers.weights_pitch;
            const Simd::F shift = Simd::set1(tops[i]);
            Simd::F sum = Simd::zero();
            int64_t c = 0;
            for (; c < visible[i]; c += L) {
                const Simd::F weight = power_of_two(Simd::load(row + c) - shift);
                Dot::store_elements(to + c / Dot::kDepth, weight);
                sum = sum + weight;
            }
            for (; c < end; c += L) Dot::store_elements(to + c / Dot::kDepth, Simd::zero());
            Simd::store(lanes[i], sum);
            float* out = buffers.out + (begin + i) * buffers.sizes.columns_pitch;
            if (key_begin > 0 && rescale[i] != 1)
                for (c = 0; c < buffers.sizes.columns; c += L)
                    Simd::store(out + c, Simd::load(out + c) * Simd::set1(rescale[i]));
        }
        const Simd::F sum = across(lanes, sum_of);
        Simd::store(buffers.sum + begin, Simd::fmadd(Simd::load(buffers.sum + begin), scale, sum));
    }

    // The rows [begin, begin + count) of the span against the packed keys.
    void block(int64_t begin, int64_t count, Range keys) const {
        const HeadSizes<Dot>& sizes = buffers.sizes;
        const int64_t* visible = buffers.visible + begin;
        const int64_t end = smaller(largest(visible, count), keys.end) - keys.begin;
        if (end <= 0) return;
        pack_queries<Dot>(pass, pass.query, batch, head, row_begin + begin, count, buffers.queries);
        for (int64_t n = 0, first = 0; n < end; n += kStripe) {
            while (visible[first] <= keys.begin + n) ++first;
            multiply_panel<Dot>(count - first, smaller(kStripe, end - n),
                                {buffers.queries + first * sizes.pitch, sizes.pitch, 1},
                                {buffers.key_stripes + n * sizes.words, kStripe}, false,
                                {buffers.scores + first * buffers.scores_pitch + n, buffers.scores_pitch},
                                [&](int64_t, int64_t) { return Range{0, sizes.words}; });
        }
        for (int64_t r = 0; r < count; r += L)
            softmax(begin + r, smaller(L, count - r), keys.begin, end, buffers.scores + r * buffers.scores_pitch,
                    buffers.weights + r * buffers.weights_pitch);
        multiply_panel<Dot>(count, sizes.columns, {buffers.weights, buffers.weights_pitch, 1},
                            {buffers.value_pairs, sizes.columns_pitch}, keys.begin > 0,
                            {buffers.out + begin * sizes.columns_pitch, sizes.columns_pitch},
                            [&](int64_t m, int64_t rows) {
                                const int64_t seen = smaller(end, largest(visible + m, rows) - keys.begin);
                                return Range{0, seen > 0 ? divide_up(seen, Dot::kDepth) : 0};
                            });
    }

    void span(int64_t rows) const {
        visible_of(pass, batch, head, row_begin, rows, buffers.visible);
        for (int64_t r = 0; r < buffers.span; ++r) buffers.top[r] = kNoScore, buffers.sum[r] = 0;
        const int64_t seen = largest(buffers.visible, rows);
        for (int64_t begin = 0; begin < seen; begin += buffers.keys) {
            const Range keys = {begin, smaller(begin + buffers.keys, seen)};
            pack_keys<Dot>(pass, pass.prefix_key, pass.key, batch, head, keys, buffers.staged, buffers.key_stripes,
                           nullptr);
            pack_keys<Dot>(pass, pass.prefix_value, pass.value, batch, head, keys, buffers.staged, nullptr,
                           buffers.value_pairs);
            for (int64_t m = 0; m < rows; m += kQueryRows) block(m, smaller(kQueryRows, rows - m), keys);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = row_begin + r, of_query = head * pass.group + row % pass.group;
            float* out = buffers.out + r * buffers.sizes.columns_pitch;
            prefetch_query<1>(pass, pass.out, batch, head, row + kRowsAhead);
            const bool sees = buffers.sum[r] > 0;  // without a prefix a row may see nothing
            if (!sees) memset(out, 0, static_cast<size_t>(buffers.sizes.columns) * sizeof(float));
            store_row(pass, out, sees ? 1 / buffers.sum[r] : 0, pass.out, batch, of_query, row / pass.group);
            *number_at(pass.lse, batch, of_query, row / pass.group) = buffers.top[r] * kLn2 + logf(buffers.sum[r]);
        }
    }
};

template <class Dot>
void forward_item(const PrefixAttention& pass, int64_t item, void* memory) {
    const ForwardBuffers<Dot> buffers(pass, memory);
    const int64_t spans = prefix_spans(pass), begin = item % spans * buffers.span, pair = item / spans;
    const int64_t rows = smaller(buffers.span, prefix_rows(pass) - begin);
    if (rows > 0) Forward<Dot>{pass, buffers, pair / pass.kv_heads, pair % pass.kv_heads, begin}.span(rows);
}

// bf16 is multiplied as such where the level can.
template <class Bf16>
void prefix_forward(const PrefixAttention* pass, int64_t item, void* memory) {
    if (pass->query.dtype == Dtype::kBFloat16) return forward_item<Bf16>(*pass, item, memory);
    forward_item<Fp32Dot>(*pass, item, memory);
}
template <class Bf16>
size_t prefix_forward_bytes(const PrefixAttention* pass) {
    if (pass->query.dtype == Dtype::kBFloat16) return ForwardBuffers<Bf16>(*pass, nullptr).bytes;
    return ForwardBuffers<Fp32Dot>(*pass, nullptr).bytes;
}

}  // namespace
}  // namespace peftkern
