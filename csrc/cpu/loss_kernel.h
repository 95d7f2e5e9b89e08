// Cross entropy of rows of logits, for the instruction set whose Simd the including file chose. Exponents are of
// base 2.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cpu/exponential.h"
#include "cpu/gemm.h"
#include "cpu/panel_fp32.h"

namespace peftkern {
namespace {

constexpr float kLossLog2E = 1.44269504f;
// Sums run in so many vectors side by side, as their additions take several cycles each.
constexpr int kLossChains = 4;

// Combines f(vector) over the `count` elements of a row. What a row's last vector lacks, it takes for -infinity.
template <class Combine, class Map>
float over_row(const uint8_t* row, Dtype dtype, int64_t count, float start, Combine combine, Map map) {
    constexpr int L = Simd::kLanes;
    const int64_t bytes = element_bytes(dtype);
    Simd::F chains[kLossChains];
    for (Simd::F& chain : chains) chain = Simd::set1(start);
    int64_t c = 0;
    for (; c + kLossChains * L <= count; c += kLossChains * L)
#pragma GCC unroll 4
        for (int i = 0; i < kLossChains; ++i)
            chains[i] = combine(chains[i], map(load_elements(row + (c + i * L) * bytes, dtype, L)));
    for (; c < count; c += L) {
        alignas(64) float lanes[L];
        Simd::store(lanes, load_elements(row + c * bytes, dtype, count - c));
        for (int64_t i = count - c; i < L; ++i) lanes[i] = -INFINITY;
        chains[0] = combine(chains[0], map(Simd::load(lanes)));
    }
    alignas(64) float lanes[L];
    Simd::store(lanes, combine(combine(chains[0], chains[1]), combine(chains[2], chains[3])));
    float result = lanes[0];
    for (int i = 1; i < L; ++i) result = combine(result, lanes[i]);
    return result;
}

struct Larger {
    template <class T>
    T operator()(T a, T b) const {
        return a > b ? a : b;  // of NaN either; the sum has it
    }
};
struct Sum {
    template <class T>
    T operator()(T a, T b) const {
        return a + b;
    }
};

inline float element_of(const uint8_t* row, Dtype dtype, int64_t column) {
    alignas(64) float lanes[Simd::kLanes];
    Simd::store(lanes, load_elements(row + column * element_bytes(dtype), dtype, 1));
    return lanes[0];
}

inline void cross_entropy(const CrossEntropy* pass, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        const uint8_t* logits = element_at(pass->logits, row, 0);
        const Dtype dtype = pass->logits.dtype;
        const float top = over_row(logits, dtype, pass->columns, -INFINITY, Larger(), [](Simd::F x) { return x; });
        const Simd::F factor = Simd::set1(kLossLog2E), tops = Simd::set1(top);
        const float sum = over_row(logits, dtype, pass->columns, 0, Sum(),
                                   [&](Simd::F x) { return power_of_two((x - tops) * factor); });
        pass->top[row] = top;
        pass->log_sum[row] = logf(sum);
        const int64_t target = pass->targets[row];
        pass->losses[row] =
            target == pass->ignored ? 0 : pass->log_sum[row] - (element_of(logits, dtype, target) - top);
    }
}

inline void cross_entropy_backward(const CrossEntropy* pass, int64_t row_begin, int64_t row_end) {
    constexpr int L = Simd::kLanes;
    for (int64_t row = row_begin; row < row_end; ++row) {
        const uint8_t* logits = element_at(pass->logits, row, 0);
        const Dtype dtype = pass->logits.dtype;
        const int64_t bytes = element_bytes(dtype), target = pass->targets[row];
        uint8_t* grad = static_cast<uint8_t*>(pass->grad_logits) + row * pass->columns * bytes;
        if (target == pass->ignored) {
            memset(grad, 0, static_cast<size_t>(pass->columns * bytes));
            continue;
        }
        const float top = pass->top[row], log_sum = pass->log_sum[row];
        const Simd::F factor = Simd::set1(kLossLog2E), tops = Simd::set1(top);
        const Simd::F shift = Simd::set1(-log_sum * kLossLog2E), outer = Simd::set1(pass->grad_losses[row]);
        for (int64_t c = 0; c < pass->columns; c += L) {
            const Simd::F x = load_elements(logits + c * bytes, dtype, pass->columns - c);
            store_elements(grad + c * bytes, dtype, pass->columns - c,
                           power_of_two(Simd::fmadd(x - tops, factor, shift)) * outer);
        }
        const float weight = expf(element_of(logits, dtype, target) - top - log_sum);
        store_elements(grad + target * bytes, dtype, 1, Simd::set1((weight - 1) * pass->grad_losses[row]));
    }
}

}  // namespace
}  // namespace peftkern
