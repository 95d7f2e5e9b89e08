// Fp32Dot: how X and W are laid out for products in fp32. A packed element is one fp32 word.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/nf4_codes.h"
#include "cpu/philox.h"

namespace peftkern {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline const uint8_t* element_at(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(matrix.data) + (row * matrix.stride + column) * element_bytes(matrix.dtype);
}

// One vector of `count` elements in fp32, zeros behind them.
inline Simd::F load_elements(const uint8_t* p, Dtype dtype, int64_t count) {
    alignas(64) uint8_t padded[4 * Simd::kLanes];
    if (count < Simd::kLanes) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, p, static_cast<size_t>(count * element_bytes(dtype)));
        p = padded;
    }
    switch (dtype) {
        case Dtype::kBFloat16: return Simd::from_bf16(reinterpret_cast<const uint16_t*>(p));
        case Dtype::kFloat16: return Simd::from_f16(reinterpret_cast<const uint16_t*>(p));
        default: return Simd::load(reinterpret_cast<const float*>(p));
    }
}

inline void store_elements(uint8_t* p, Dtype dtype, int64_t count, Simd::F value) {
    alignas(64) uint8_t padded[4 * Simd::kLanes];
    uint8_t* target = count < Simd::kLanes ? padded : p;
    switch (dtype) {
        case Dtype::kBFloat16: Simd::to_bf16(reinterpret_cast<uint16_t*>(target), value); break;
        case Dtype::kFloat16: Simd::to_f16(reinterpret_cast<uint16_t*>(target), value); break;
        default: Simd::store(reinterpret_cast<float*>(target), value);
    }
    if (count < Simd::kLanes) memcpy(p, padded, static_cast<size_t>(count * element_bytes(dtype)));
}

struct Fp32Dot {
    static constexpr int kDepth = 1;  // contraction elements per word
    static Simd::F load(const uint32_t* p) { return Simd::load(reinterpret_cast<const float*>(p)); }
    static Simd::F broadcast(const uint32_t* p) { return Simd::set1(*reinterpret_cast<const float*>(p)); }
    static Simd::F dot(Simd::F acc, Simd::F x, Simd::F w) { return Simd::fmadd(x, w, acc); }

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

    // A stripe of W: `columns` columns from column_begin as [depth][vectors * lanes] words, zeros in the last vector's
    // overhang.
    static void pack_stripe(const Contraction& c, const StagedCodes& staged, int64_t depth_begin, int64_t depth,
                            int64_t column_begin, int64_t columns, int vectors, uint32_t* panel) {
        float* out = reinterpret_cast<float*>(panel);
        const int64_t width = vectors * Simd::kLanes;
        if (c.nf4 && !aligned(*c.nf4)) {
            nf4_unaligned(c, depth_begin, depth, column_begin, columns, width, out);
        } else if (c.nf4 && c.weight_transposed) {
            nf4_transposed(*c.nf4, depth_begin, depth, column_begin, columns, vectors, out);
        } else if (c.nf4) {
            nf4_rows(staged, depth, column_begin, vectors, out);
        } else if (c.weight_transposed) {
            dense_transposed(c.weight, depth_begin, depth, column_begin, columns, vectors, out);
        } else {
            dense_rows(c, depth_begin, depth, column_begin, columns, vectors, out);
        }
    }

private:
    static void dense_rows(const Contraction& c, int64_t depth_begin, int64_t depth, int64_t column_begin,
                           int64_t columns, int vectors, float* out) {
        const int64_t width = vectors * Simd::kLanes, bytes = element_bytes(c.weight.dtype);
        for (int64_t k = 0; k < depth; ++k, out += width) {
            const uint8_t* p = element_at(c.weight, depth_begin + k, column_begin);
            for (int64_t n = 0; n < width; n += Simd::kLanes)
                Simd::store(out + n, load_elements(p + n * bytes, c.weight.dtype, columns - n));
            if (c.weight_dropout.threshold) apply_dropout(c.weight_dropout, depth_begin + k, column_begin, columns, out);
        }
    }

    static void dense_transposed(const Matrix& w, int64_t depth_begin, int64_t depth, int64_t column_begin,
                                 int64_t columns, int vectors, float* out) {
        constexpr int L = Simd::kLanes;
        alignas(64) float block[L][L];
        Simd::I words[L];
        for (int v = 0; v < vectors; ++v)
            for (int64_t k = 0; k < depth; k += L) {
                for (int i = 0; i < L; ++i) {
                    const bool any = v * L + i < columns;
                    const uint8_t* p = any ? element_at(w, column_begin + v * L + i, depth_begin + k) : nullptr;
                    Simd::store(block[i], any ? load_elements(p, w.dtype, depth - k) : Simd::zero());
                }
                Simd::transpose_words(reinterpret_cast<const uint8_t*>(block), sizeof block[0], words);
                const int64_t n = smaller(L, depth - k);
                for (int64_t j = 0; j < n; ++j)
                    Simd::store_words(reinterpret_cast<uint32_t*>(out + ((k + j) * vectors + v) * L), words[j]);
            }
    }

    static void nf4_transposed(const Nf4& q, int64_t depth_begin, int64_t depth, int64_t column_begin, int64_t columns,
                               int vectors, float* out) {
        constexpr int L = Simd::kLanes;
        const Simd::Table table = Simd::nf4_table();
        const int64_t step = vectors * L;
        for (int64_t block = 0; block < depth; block += 8 * L)
            for (int v = 0; v < vectors; ++v) {
                float* target = out + block * step + v * L;
                nf4_words<1>(q, depth_begin + block, smaller(8 * L, depth - block), column_begin + v * L, columns - v * L,
                             [&](int64_t k, Simd::I codes, const float* scales) {
                                 float* p = target + k * step;
                                 const Simd::F scale = Simd::load(scales);
#pragma GCC unroll 8
                                 for (int e = 0; e < 8; ++e, p += step)
                                     Simd::store(p, Simd::lookup(table, Simd::srl(codes, nibble_shift(e))) * scale);
                             });
            }
    }

    static void nf4_rows(const StagedCodes& staged, int64_t depth, int64_t column, int vectors, float* out) {
        constexpr int L = Simd::kLanes;
        const Simd::Table table = Simd::nf4_table();
        for (int64_t k = 0; k < depth; ++k) {
            const uint8_t* codes = staged.codes_at(k, column);
            const float* scales = staged.scales_at(k, column);
            for (int v = 0; v < vectors; ++v, out += L) {
                const Simd::F scale = Simd::set1(scales[(v * L) >> staged.run_shift]);
                Simd::store(out, Simd::lookup(table, Simd::row_codes(codes + v * L / 2)) * scale);
            }
        }
    }

    static void nf4_unaligned(const Contraction& c, int64_t depth_begin, int64_t depth, int64_t column_begin,
                              int64_t columns, int64_t width, float* out) {
        for (int64_t k = depth_begin; k < depth_begin + depth; ++k)
            for (int64_t n = 0; n < width; ++n) {
                const int64_t column = column_begin + n;
                const bool any = n < columns;
                *out++ = any ? (c.weight_transposed ? nf4_value(*c.nf4, column, k) : nf4_value(*c.nf4, k, column)) : 0;
            }
    }

public:
    // Reads one vector of rows of q (columns of the stripe) x `depth` <= 8 * lanes codes. Calls use(k, codes, scales) for
    // each word of 8 codes: lane c has row row_begin + c, its codes at nibble_shift(0..7), k counts from depth_begin.
    // `scales` points at each lane's scale, each repeated kRepeat times; 0 in lanes beyond `rows`.
    template <int kRepeat, class Use>
    static void nf4_words(const Nf4& q, int64_t depth_begin, int64_t depth, int64_t row_begin, int64_t rows, Use use) {
        constexpr int L = Simd::kLanes;
        alignas(64) float scales[8 * L / kAlignedColumns][L * kRepeat];
        alignas(64) uint8_t padded[L][4 * L];
        Simd::I words[L];
        const int64_t run = granule(q, 8 * L), count = depth / 8;
        const int shift = block_shift(q), run_shift = __builtin_ctzll(static_cast<unsigned long long>(run));
        const int64_t first = row_begin * q.columns + depth_begin;
        for (int64_t i = 0; i << run_shift < depth; ++i)
            for (int c = 0; c < L; ++c) {
                const int64_t block = (first + c * q.columns + (i << run_shift)) >> shift;
                const float scale = c < rows ? block_absmax(q, block) : 0.0f;
                for (int r = 0; r < kRepeat; ++r) scales[i][c * kRepeat + r] = scale;
            }
        const uint8_t* codes = q.codes + (first >> 1);
        // The next stripe's codes: rows are far apart, which the hardware prefetchers do not follow.
        for (int c = 0; c < L; ++c)
            __builtin_prefetch(codes + (c + Simd::kVectors * L) * (q.columns >> 1), 0, 2);
        if (rows >= L && count == L) {
            Simd::transpose_words(codes, q.columns >> 1, words);
        } else {
            for (int64_t c = 0; c < smaller(rows, L); ++c)
                memcpy(padded[c], codes + c * (q.columns >> 1), static_cast<size_t>(4 * count));
            Simd::transpose_words(padded[0], sizeof padded[0], words);
        }
        for (int64_t j = 0; j < count; ++j) use(8 * j, words[j], scales[(8 * j) >> run_shift]);
    }
};

}  // namespace
}  // namespace peftkern
