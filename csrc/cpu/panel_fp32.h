// Fp32Dot: how X and W are laid out for products in fp32. A packed element is one fp32 word.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/nf4_codes.h"
#include "cpu/philox.h"

namespace peftkern {
namespace {

inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

inline int64_t element_bytes(Dtype dtype) {
    return dtype == Dtype::kFloat32 ? 4 : 2;
}

inline const uint8_t* element_at(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(matrix.data) + (row * matrix.stride + column) * element_bytes(matrix.dtype);
}

// Not inlined: what runs once for many products, and would be copied into every one of their loops (half of the time
// of compiling this level, measured).
#define PEFTKERN_APART __attribute__((noinline))

inline Simd::F load_vector(const uint8_t* p, Dtype dtype) {
    switch (dtype) {
        case Dtype::kBFloat16:
            return Simd::from_bf16(reinterpret_cast<const uint16_t*>(p));
        case Dtype::kFloat16:
            return Simd::from_f16(reinterpret_cast<const uint16_t*>(p));
        default:
            return Simd::load(reinterpret_cast<const float*>(p));
    }
}

PEFTKERN_APART inline Simd::F load_rest(const uint8_t* p, Dtype dtype, int64_t count) {
    alignas(64) uint8_t padded[4 * Simd::kLanes] = {};
    memcpy(padded, p, static_cast<size_t>(count * element_bytes(dtype)));
    return load_vector(padded, dtype);
}

// One vector of `count` elements in fp32, zeros behind them.
inline Simd::F load_elements(const uint8_t* p, Dtype dtype, int64_t count) {
    return count < Simd::kLanes ? load_rest(p, dtype, count) : load_vector(p, dtype);
}

inline void store_elements(uint8_t* p, Dtype dtype, int64_t count, Simd::F value) {
    alignas(64) uint8_t padded[4 * Simd::kLanes];
    uint8_t* target = count < Simd::kLanes ? padded : p;
    switch (dtype) {
        case Dtype::kBFloat16:
            Simd::to_bf16(reinterpret_cast<uint16_t*>(target), value);
            break;
        case Dtype::kFloat16:
            Simd::to_f16(reinterpret_cast<uint16_t*>(target), value);
            break;
        default:
            Simd::store(reinterpret_cast<float*>(target), value);
    }
    if (count < Simd::kLanes) memcpy(p, padded, static_cast<size_t>(count * element_bytes(dtype)));
}

// out[j] lane c = word j of row c, for up to `lanes` rows, `pitch` bytes apart, of up to `lanes` words.
PEFTKERN_APART inline void load_words(const uint8_t* p, int64_t pitch, int64_t rows, int64_t words, Simd::I* out) {
    constexpr int L = Simd::kLanes;
    if (rows >= L && words == L) return Simd::transpose_words(p, pitch, out);
    alignas(64) uint8_t padded[L][4 * L] = {};
    for (int64_t c = 0; c < smaller(rows, L); ++c) memcpy(padded[c], p + c * pitch, static_cast<size_t>(4 * words));
    Simd::transpose_words(padded[0], sizeof padded[0], out);
}

// One vector of rows of a matrix x up to 8 * lanes codes, each scale repeated kRepeat times.
template <int kRepeat>
struct Nf4Block {
    static constexpr int L = Simd::kLanes;
    static constexpr int64_t kDepth = 8 * L;
    Simd::I words[L];  // word j lane c: codes 8j .. 8j + 7 of row c, at nibble_shift(0..7)
    alignas(64) float scales[kDepth / kAlignedColumns][L * kRepeat];
    int64_t word_count;
    int run_shift;  // codes per scale

    const float* scales_of(int64_t word) const { return scales[(8 * word) >> run_shift]; }

    // Lanes beyond `rows` have scale 0.
    PEFTKERN_APART void load(const Nf4& q, int64_t row_begin, int64_t rows, int64_t column, int64_t depth) {
        const int64_t run = granule(q, kDepth), first = row_begin * q.columns + column;
        const int shift = block_shift(q);
        run_shift = __builtin_ctzll(static_cast<unsigned long long>(run));
        word_count = smaller(kDepth, depth) / 8;
        for (int64_t i = 0; i << run_shift < 8 * word_count; ++i)
            for (int c = 0; c < L; ++c) {
                const int64_t block = (first + c * q.columns + (i << run_shift)) >> shift;
                const float scale = c < rows ? block_absmax(q, block) : 0.0f;
                for (int r = 0; r < kRepeat; ++r) scales[i][c * kRepeat + r] = scale;
            }
        const uint8_t* codes = q.codes + (first >> 1);
        // The next stripe's codes: rows are far apart, which the hardware prefetchers do not follow.
        for (int c = 0; c < L; ++c) __builtin_prefetch(codes + (c + Simd::kVectors * L) * (q.columns >> 1), 0, 2);
        load_words(codes, q.columns >> 1, rows, word_count, words);
    }
};

// The part of W that one call of a Dot's `columns_of` reads: a chunk of depth x up to some vectors of columns.
struct Columns {
    const Contraction& c;
    const StagedCodes& staged;
    int64_t depth_begin, depth, begin, count;
};

struct Fp32Dot {
    static constexpr int kDepth = 1;  // contraction elements per word
    using W = Simd::F;
    static W load(const uint32_t* p) { return Simd::load(reinterpret_cast<const float*>(p)); }
    static void store(uint32_t* p, W w) { Simd::store(reinterpret_cast<float*>(p), w); }
    static W broadcast(const uint32_t* p) { return Simd::set1(*reinterpret_cast<const float*>(p)); }
    static Simd::F dot(Simd::F acc, W x, W w) { return Simd::fmadd(x, w, acc); }
    // Of kDepth rows, the words of their columns, and the elements of one.
    static W words_of(const Simd::F (&rows)[1]) { return rows[0]; }
    static void store_elements(uint32_t* p, Simd::F row) { store(p, row); }

    // Whether X's rows are these words already.
    static bool words_in_place(const Contraction& c) {
        return c.x.dtype == Dtype::kFloat32 && !c.x_transposed && c.x_scale == 1 && !c.x_dropout.threshold;
    }

    // One row of X: `depth` elements from depth_begin, as words.
    static void pack_row(const Contraction& c, int64_t row, int64_t depth_begin, int64_t depth, uint32_t* words) {
        float* out = reinterpret_cast<float*>(words);
        if (c.x_transposed) {
            const float* p = static_cast<const float*>(c.x.data) + depth_begin * c.x.stride + row;
            for (int64_t k = 0; k < depth; ++k) out[k] = p[k * c.x.stride] * c.x_scale;
            return;
        }
        const uint8_t* p = element_at(c.x, row, depth_begin);
        const Simd::F scale = Simd::set1(c.x_scale);
        for (int64_t k = 0; k < depth; k += Simd::kLanes) {
            const Simd::F v = load_elements(p + k * element_bytes(c.x.dtype), c.x.dtype, depth - k);
            Simd::store(out + k, v * scale);  // the row's padding holds a vector's overhang
        }
        if (c.x_dropout.threshold) apply_dropout(c.x_dropout, row, depth_begin, depth, out);
    }

    // Calls emit(word, v, vector) for each word of depth of V vectors of W's columns, zeros beyond its count.
    template <int V, class Emit>
    static void columns_of(const Columns& w, Emit emit) {
        if (!is_direct(w.c)) return nf4_unaligned<V>(w, emit);
        direct_columns_of<V>(w, emit);
    }

    // Whether columns may go straight to the products, with few rows; what is decoded one by one gains nothing by it.
    static bool is_direct(const Contraction& c) { return !c.nf4 || aligned(*c.nf4); }
    template <int V, class Emit>
    static void direct_columns_of(const Columns& w, Emit emit) {
        if (w.c.nf4) return w.c.weight_transposed ? nf4_transposed<V>(w, emit) : nf4_rows<V>(w, emit);
        return w.c.weight_transposed ? dense_transposed<V>(w, emit) : dense_rows<V>(w, emit);
    }

  private:
    static constexpr int L = Simd::kLanes;

    template <int V, class Emit>
    static void dense_rows(const Columns& w, Emit emit) {
        const Matrix& matrix = w.c.weight;
        for (int64_t k = 0; k < w.depth; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const uint8_t* p = element_at(matrix, w.depth_begin + k, w.begin + v * L);
                emit(k, v, load_elements(p, matrix.dtype, w.count - v * L));
            }
    }

    // words[j] lane i = element depth_begin + j of row `begin` + i.
    PEFTKERN_APART static void load_columns(const Matrix& matrix, int64_t begin, int64_t count, int64_t depth_begin,
                                            int64_t depth, Simd::I (&words)[L]) {
        alignas(64) float block[L][L];
        for (int64_t i = 0; i < L; ++i)
            Simd::store(block[i], i < count
                                      ? load_elements(element_at(matrix, begin + i, depth_begin), matrix.dtype, depth)
                                      : Simd::zero());
        Simd::transpose_words(reinterpret_cast<const uint8_t*>(block), sizeof block[0], words);
    }

    template <int V, class Emit>
    static void dense_transposed(const Columns& w, Emit emit) {
        const Matrix& matrix = w.c.weight;
        Simd::I words[L];
        for (int64_t k = 0; k < w.depth; k += L)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                load_columns(matrix, w.begin + v * L, smaller(L, w.count - v * L), w.depth_begin + k, w.depth - k,
                             words);
                for (int64_t j = 0; j < smaller(L, w.depth - k); ++j) emit(k + j, v, Simd::as_floats(words[j]));
            }
    }

    template <int V, class Emit>
    static void nf4_transposed(const Columns& w, Emit emit) {
        const Simd::Table table = Simd::nf4_table();
        Nf4Block<1> block;
        for (int64_t k = 0; k < w.depth; k += block.kDepth)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                block.load(*w.c.nf4, w.begin + v * L, w.count - v * L, w.depth_begin + k, w.depth - k);
                for (int64_t j = 0; j < block.word_count; ++j) {
                    const Simd::F scale = Simd::load(block.scales_of(j));
#pragma GCC unroll 8
                    for (int e = 0; e < 8; ++e) {
                        const Simd::I codes = Simd::srl(block.words[j], nibble_shift(e));
                        emit(k + 8 * j + e, v, Simd::lookup(table, codes) * scale);
                    }
                }
            }
    }

    template <int V, class Emit>
    static void nf4_rows(const Columns& w, Emit emit) {
        const Simd::Table table = Simd::nf4_table();
        for (int64_t k = 0; k < w.depth; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const int64_t column = w.begin + v * L;
                const Simd::F scale = Simd::set1(*w.staged.scales_at(k, column));
                emit(k, v, Simd::lookup(table, Simd::row_codes(w.staged.codes_at(k, column))) * scale);
            }
    }

    template <int V, class Emit>
    static void nf4_unaligned(const Columns& w, Emit emit) {
        const Nf4& q = *w.c.nf4;
        for (int64_t k = w.depth_begin; k < w.depth_begin + w.depth; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                float values[L] = {};
                for (int64_t i = 0; i < smaller(L, w.count - v * L); ++i) {
                    const int64_t n = w.begin + v * L + i;
                    values[i] = w.c.weight_transposed ? nf4_value(q, n, k) : nf4_value(q, k, n);
                }
                emit(k - w.depth_begin, v, Simd::load(values));
            }
    }
};

}  // namespace
}  // namespace peftkern
