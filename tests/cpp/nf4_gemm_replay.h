// A weight, tokens and the exact result; the small integers and the table's values make every sum exact in float64.
#pragma once

#include <vector>

#include "cuda/nf4_gemm_load.h"
#include "cuda/nf4_gemm_plan.h"
#include "tensor_core.h"

namespace peftkern {

template <Dtype kDtype>
struct Problem {
    static constexpr Dtype dtype = kDtype;
    std::vector<uint16_t> x;
    std::vector<uint8_t> codes;
    std::vector<float> absmax;
    CudaLinear linear{};
    bool backward, exact;
    std::vector<double> y;
    std::vector<int> writes;

    Problem(int64_t rows, int64_t out, int64_t in, int block_shift, bool backward, bool exact)
        : backward(backward), exact(exact) {
        const int64_t depth = backward ? out : in;
        linear.rows = rows, linear.out_features = out, linear.in_features = in;
        linear.x_stride = depth + 8;
        x.resize(rows > 0 ? rows * linear.x_stride - 8 : 0);
        for (auto& value : x) value = half_of_float<kDtype>(static_cast<int>(random_bits() % 17) - 8);
        codes.resize(out * in / 2);
        for (auto& byte : codes) byte = static_cast<uint8_t>(random_bits());
        absmax.resize(out * in >> block_shift);
        for (auto& scale : absmax) scale = static_cast<float>(1 + random_bits() % 7);
        linear.x = x.data(), linear.dtype = kDtype;
        linear.weight.codes = codes.data(), linear.weight.absmax = absmax.data();
        linear.weight.block_shift = block_shift;
        y.resize(rows * columns()), writes.resize(rows * columns());
    }

    int64_t columns() const { return backward ? linear.in_features : linear.out_features; }
    int64_t depth() const { return backward ? linear.out_features : linear.in_features; }

    float scale(ScalePlace place) const { return place.valid ? absmax.at(place.block) : 0.0f; }

    double weight(int64_t out, int64_t in) const {
        const int64_t e = out * linear.in_features + in;
        const int code = code_in(codes[byte_of(e)], e);
        const float scale = absmax[block_of(e, linear.weight.block_shift)];
        if (exact) return half_value(half_of_float<kDtype>(kNf4Codebook[code] * scale), kDtype);
        const uint16_t* table = kDtype == Dtype::kBFloat16 ? nf4_tables().bf16 : nf4_tables().fp16;
        return half_value(table[code], kDtype) * scale;
    }

    void add(int64_t row, int64_t column, double value) {
        if (row >= linear.rows || column >= columns()) return;
        y[row * columns() + column] += value;
        ++writes[row * columns() + column];
    }

    std::vector<double> dense() const {
        std::vector<double> values(linear.out_features * linear.in_features);
        for (int64_t out = 0; out < linear.out_features; ++out)
            for (int64_t in = 0; in < linear.in_features; ++in) values[out * linear.in_features + in] = weight(out, in);
        return values;
    }
    double sum(const std::vector<double>& dense, int64_t row, int64_t column) const {
        double sum = 0;
        for (int64_t k = 0; k < depth(); ++k)
            sum += half_value(x[row * linear.x_stride + k], kDtype) *
                   dense[backward ? k * linear.in_features + column : column * depth() + k];
        return sum;
    }

    // Every output is right, and was written once by every slice.
    bool right(int slices) const {
        const std::vector<double> weights = dense();
        for (int64_t row = 0; row < linear.rows; ++row)
            for (int64_t column = 0; column < columns(); ++column) {
                const double wanted = sum(weights, row, column);
                const int64_t at = row * columns() + column;
                if (y[at] != wanted || writes[at] != slices) {
                    printf("row %ld column %ld: %.17g, wanted %.17g; written %d times\n", long(row), long(column),
                           y[at], wanted, writes[at]);
                    return false;
                }
            }
        return true;
    }
};

// What a block does, over all tiles and slices of a plan: body(tile).
template <class Shape, class ProblemType, class Body>
void for_tiles(const ProblemType& problem, const GemmPlan& plan, Body&& body) {
    const int64_t token_tiles = steps_of(problem.linear.rows, plan.tokens);
    const int64_t tiles = token_tiles * steps_of(problem.columns(), Shape::kTile);
    const int total = static_cast<int>(steps_of(problem.depth(), Shape::kStep));
    for (int slice = 0; slice < plan.slices; ++slice)
        for (int64_t block = 0; block < tiles; ++block)
            body(tile_of(block, slice, plan.tokens, Shape::kTile, token_tiles, total, plan.slice_steps));
}

}  // namespace peftkern
