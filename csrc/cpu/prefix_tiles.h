// Products of attention and how their factors lie, for the instruction set whose Simd the including file chose.
//
// A contraction runs over words of Dot::kDepth elements. A matrix is packed in up to three ways:
//     rows     [rows, words of columns]             a contraction over its columns
//     stripes  the same transposed: [stripes of kStripe rows][words of columns, kStripe]
//     pairs    [words of rows, columns]             a contraction over its rows; with kDepth 1 the same as rows
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu/gemm_kernel.h"
#include "cpu/panel_fp32.h"
#include "cpu/prefix_attention.h"

namespace peftkern {
namespace {

constexpr int64_t kStripe = Simd::kVectors * Simd::kLanes;

// Word k of row m is data[m * row + k * word].
struct Factor {
    const uint32_t* data;
    int64_t row, word;
};
// Word k of the columns begins at data + k * word.
struct Panel {
    const uint32_t* data;
    int64_t word;
};
struct Sums {
    float* data;
    int64_t row;
};
struct Range {
    int64_t begin, end;
};

// c [R, V vectors] = x @ w, or added to it.
template <class Dot, int R, int V>
void multiply_tile(const Factor& x, const Panel& w, int64_t words, bool add, const Sums& c) {
    constexpr int L = Simd::kLanes;
    Simd::F acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = add ? Simd::load(c.data + r * c.row + v * L) : Simd::zero();
    const uint32_t *left = x.data, *right = w.data;
    for (int64_t k = 0; k < words; ++k, left += x.word, right += w.word) {
        typename Dot::W columns[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) columns[v] = Dot::load(right + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const auto row = Dot::broadcast(left + r * x.row);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r][v] = Dot::dot(acc[r][v], row, columns[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) Simd::store(c.data + r * c.row + v * L, acc[r][v]);
}

// The same for up to R rows.
template <class Dot, int R, int V>
void multiply_tile_rows(int64_t rows, const Factor& x, const Panel& w, int64_t words, bool add, const Sums& c) {
    if constexpr (R > 0) {
        if (rows == R) return multiply_tile<Dot, R, V>(x, w, words, add, c);
        multiply_tile_rows<Dot, R - 1, V>(rows, x, w, words, add, c);
    }
}

// c [rows, columns] = x @ w, or added to it, over the words words_of(first row, rows) of each tile. Columns are
// computed in whole vectors.
template <class Dot, class Words>
void multiply_panel(int64_t rows, int64_t columns, const Factor& x, const Panel& w, bool add, const Sums& c,
                    Words words_of) {
    for (int64_t n = 0; n < columns; n += kStripe)
        with_vectors(columns - n, [&](auto vectors) {
            constexpr int V = decltype(vectors)::value, R = V == 1 ? Simd::kNarrowRows : Simd::kRows;
            for (int64_t m = 0; m < rows; m += R) {
                const int64_t count = smaller(R, rows - m);
                const Range k = words_of(m, count);
                multiply_tile_rows<Dot, R, V>(count, {x.data + m * x.row + k.begin * x.word, x.row, x.word},
                                              {w.data + k.begin * w.word + n, w.word}, k.end - k.begin, add,
                                              {c.data + m * c.row + n, c.row});
            }
        });
}

inline uint8_t* row_at(const Heads& heads, int64_t batch, int64_t head, int64_t row) {
    const int64_t index = batch * heads.batch + head * heads.head + row * heads.row;
    return static_cast<uint8_t*>(heads.data) + index * element_bytes(heads.dtype);
}

inline float* number_at(const Heads& heads, int64_t batch, int64_t head, int64_t row) {
    return reinterpret_cast<float*>(row_at(heads, batch, head, row));
}

// Rows of a head lie thousands of bytes apart, which the hardware prefetchers do not follow (8 rows ahead, one query
// with a cache takes 1.4 times as long).
constexpr int64_t kRowsAhead = 24;
template <int kForWriting>
void prefetch_row(const uint8_t* row, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, kForWriting, 2);
}

// One row of `columns` elements as words, rounded once to their type; the last word is filled up with zeros.
template <class Dot>
void pack_row(const uint8_t* from, Dtype dtype, int64_t columns, uint32_t* to) {
    constexpr Dtype kType = Dot::kDepth == 2 ? Dtype::kBFloat16 : Dtype::kFloat32;
    to[(columns - 1) / Dot::kDepth] = 0;
    if (dtype == kType) {
        memcpy(to, from, static_cast<size_t>(columns * element_bytes(kType)));
        return;
    }
    for (int64_t c = 0; c < columns; c += Simd::kLanes)
        store_elements(reinterpret_cast<uint8_t*>(to) + c * element_bytes(kType), kType, columns - c,
                       load_elements(from + c * element_bytes(dtype), dtype, columns - c));
}

// Rows to a stripe: [words, kStripe], zeros behind the last row up to a whole vector.
inline void rows_to_stripe(const uint32_t* rows, int64_t pitch, int64_t count, int64_t words, uint32_t* stripe) {
    constexpr int L = Simd::kLanes;
    Simd::I block[L];
    for (int64_t row = 0; row < count; row += L)
        for (int64_t k = 0; k < words; k += L) {
            load_words(reinterpret_cast<const uint8_t*>(rows + row * pitch + k), 4 * pitch, count - row,
                       smaller(L, words - k), block);
            for (int64_t j = 0; j < smaller(L, words - k); ++j)
                Simd::store(reinterpret_cast<float*>(stripe + (k + j) * kStripe + row), Simd::as_floats(block[j]));
        }
}

// Rows to pairs; a missing last row is zeros.
template <class Dot>
void rows_to_pairs(const uint32_t* rows, int64_t pitch, int64_t count, int64_t columns, uint32_t* pairs,
                   int64_t pairs_pitch) {
    for (int64_t row = 0; row < count; row += Dot::kDepth, pairs += pairs_pitch) {
        const uint32_t* words = rows + row * pitch;
        if constexpr (Dot::kDepth == 1) {
            memcpy(pairs, words, static_cast<size_t>(4 * columns));
        } else {
            const auto* first = reinterpret_cast<const uint16_t*>(words);
            const auto* second = reinterpret_cast<const uint16_t*>(words + pitch);
            if (row + 1 < count)
                for (int64_t c = 0; c < columns; ++c) pairs[c] = first[c] | static_cast<uint32_t>(second[c]) << 16;
            else
                for (int64_t c = 0; c < columns; ++c) pairs[c] = first[c];
        }
    }
}

// Sizes that follow from the head, in words and floats; nothing lies a power of two apart.
template <class Dot>
struct HeadSizes {
    int64_t words, pitch, columns, columns_pitch;

    explicit HeadSizes(const PrefixAttention& pass)
        : words(divide_up(pass.head_dim, Dot::kDepth)),
          pitch(prefix_padded(words) + kPrefixPadding),
          columns(prefix_padded(pass.head_dim)),
          columns_pitch(columns + kPrefixPadding) {}
};

// Keys or values [begin, end), prefix first, of one batch element and head. Stripes and pairs may be null.
template <class Dot>
void pack_keys(const PrefixAttention& pass, const Heads& prefix, const Heads& tokens, int64_t batch, int64_t head,
               Range keys, uint32_t* staged, uint32_t* stripes, uint32_t* pairs) {
    const HeadSizes<Dot> sizes(pass);
    for (int64_t begin = keys.begin; begin < keys.end; begin += kStripe) {
        const int64_t count = smaller(kStripe, keys.end - begin);
        for (int64_t j = 0; j < count; ++j) {
            const int64_t token = begin + j - pass.prefix_length;
            const Heads& from = token < 0 ? prefix : tokens;
            const uint8_t* row = row_at(from, batch, head, token < 0 ? begin + j : token);
            prefetch_row<0>(row + kRowsAhead * from.row * element_bytes(from.dtype),
                            pass.head_dim * element_bytes(from.dtype));
            pack_row<Dot>(row, from.dtype, pass.head_dim, staged + j * sizes.pitch);
        }
        const int64_t done = begin - keys.begin;
        if (stripes) rows_to_stripe(staged, sizes.pitch, count, sizes.words, stripes + done * sizes.words);
        if (pairs)
            rows_to_pairs<Dot>(staged, sizes.pitch, count, pass.head_dim,
                               pairs + done / Dot::kDepth * sizes.columns_pitch, sizes.columns_pitch);
    }
}

template <int kForWriting>
void prefetch_query(const PrefixAttention& pass, const Heads& heads, int64_t batch, int64_t head, int64_t row) {
    prefetch_row<kForWriting>(row_at(heads, batch, head * pass.group + row % pass.group, row / pass.group),
                              pass.head_dim * element_bytes(heads.dtype));
}

// Rows [begin, begin + count) of an attention as rows.
template <class Dot>
void pack_queries(const PrefixAttention& pass, const Heads& from, int64_t batch, int64_t head, int64_t begin,
                  int64_t count, uint32_t* rows) {
    const HeadSizes<Dot> sizes(pass);
    for (int64_t r = begin; r < begin + count; ++r, rows += sizes.pitch) {
        prefetch_query<0>(pass, from, batch, head, r + kRowsAhead);
        pack_row<Dot>(row_at(from, batch, head * pass.group + r % pass.group, r / pass.group), from.dtype,
                      pass.head_dim, rows);
    }
}

inline void store_row(const PrefixAttention& pass, const float* from, float factor, const Heads& to, int64_t batch,
                      int64_t head, int64_t row) {
    uint8_t* p = row_at(to, batch, head, row);
    for (int64_t c = 0; c < pass.head_dim; c += Simd::kLanes)
        store_elements(p + c * element_bytes(to.dtype), to.dtype, pass.head_dim - c,
                       Simd::load(from + c) * Simd::set1(factor));
}

// Hands out the parts of one thread's memory; without memory it counts them.
class Parts {
  public:
    explicit Parts(void* memory) : begin_(static_cast<uint8_t*>(memory)) {}
    template <class T>
    void take(T*& part, int64_t count) {
        part = begin_ ? reinterpret_cast<T*>(begin_ + bytes_) : nullptr;
        bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    }
    size_t bytes() const { return bytes_; }

  private:
    uint8_t* begin_;
    size_t bytes_ = 0;
};

}  // namespace
}  // namespace peftkern
