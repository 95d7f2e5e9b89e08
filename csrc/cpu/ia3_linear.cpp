// ia3_linear on the CPU: a scale on the output's columns, or on the input's. Formula and reference:
// peftkern/ops/ia3_linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <string>
#include <tuple>

#include "common/check.h"
#include "cpu/engine.h"

namespace peftkern {
namespace {

Tensor scale_of(const char* op, const Tensor& scale, int64_t size) {
    check_dtype(op, "scale", scale, scale.scalar_type() == torch::headeronly::ScalarType::Float, "fp32");
    check_shape(op, "scale", scale, scale.dim() == 1 && scale.size(0) == size, "[" + std::to_string(size) + "]");
    return torch::stable::contiguous(scale);
}

// x * scale, rounded to x's dtype.
Rows scaled_rows(const char* op, const Rows& x, const Tensor& scale, Tensor& memory) {
    memory = empty_with_columns(x.tensor, x.columns);
    scale_columns(
        op, {x.matrix, {}, scale.const_data_ptr<float>(), 0, memory.mutable_data_ptr(), x.columns, nullptr, x.rows},
        x.columns);
    return rows_of(op, "x", memory);
}

// Below this a scale may leave y among the subnormal numbers of its dtype, which are rounded more coarsely: fp16 has
// 2^-25 of them, 2^-21 of what was scaled, so that its rounding counts from 2^-10 on, as it should. In fp32 and bf16
// the sum of y's products would be next.
float least_divisor(Dtype y) {
    return y == Dtype::kFloat16 ? 0x1p-4f : 0x1p-40f;
}

}  // namespace

Tensor ia3_linear(Tensor x, const Tensors& w, const Integers& wf, Tensor scale, OptionalTensor bias, bool scale_input) {
    const char* op = "ia3_linear";
    const Rows rows = rows_of(op, "x", x);
    const Weight base = Weight::of(op, w, wf);
    check_features(op, "x", x, base.in_features);
    const int64_t out_features = base.out_features;
    const Tensor factors = scale_of(op, scale, scale_input ? rows.columns : out_features);
    Tensor wide_bias = bias_of(op, bias, out_features);

    Tensor y = empty_with_columns(x, out_features), memory;
    const Rows input = scale_input ? scaled_rows(op, rows, factors, memory) : rows;
    Gemm gemm = gemm_into(y, rows.rows, out_features);
    add(gemm, times_transposed(input.matrix, base));
    Tensor scaled_bias;
    if (!scale_input) {
        gemm.scaled_count = 1;
        gemm.column_scale = factors.const_data_ptr<float>();
        if (wide_bias.defined()) {
            scaled_bias = torch::stable::new_empty(wide_bias, {out_features});
            for (int64_t j = 0; j < out_features; ++j)
                scaled_bias.mutable_data_ptr<float>()[j] =
                    wide_bias.const_data_ptr<float>()[j] * factors.const_data_ptr<float>()[j];
            wide_bias = scaled_bias;
        }
    }
    if (wide_bias.defined()) gemm.bias = wide_bias.const_data_ptr<float>();
    run(op, gemm);
    return y;
}

// y is what the forward gave, or missing where the input is scaled.
std::tuple<Tensor, Tensor> ia3_linear_backward(Tensor grad_y, Tensor x, OptionalTensor y, const Tensors& w,
                                               const Integers& wf, Tensor scale, OptionalTensor bias, bool scale_input,
                                               bool need_x, bool need_scale) {
    const char* op = "ia3_linear_backward";
    const Rows dy = rows_of(op, "grad_y", grad_y), rows = rows_of(op, "x", x);
    check_shape(op, "x", x, rows.rows == dy.rows, "[..., in] with grad_y's rows");
    const Weight base = Weight::of(op, w, wf);
    check_features(op, "grad_y", grad_y, base.out_features);
    check_features(op, "x", x, base.in_features);
    const int64_t size = scale_input ? rows.columns : dy.columns;
    const Tensor factors = scale_of(op, scale, size);
    const auto* scale_data = factors.const_data_ptr<float>();
    Tensor grad_scale = torch::stable::new_empty(factors, {need_scale ? size : 0});
    auto* grad_scale_data = need_scale ? grad_scale.mutable_data_ptr<float>() : nullptr;
    Tensor grad_x = need_x ? empty_with_columns(grad_y, rows.columns) : torch::stable::new_empty(grad_y, {0});

    if (scale_input) {
        // d(scale * x) = dy W; dx = scale * that, dscale = sum of x * that.
        Tensor grad_scaled = need_scale ? empty_with_columns(grad_y, size) : grad_x;
        Gemm gemm = gemm_into(need_x ? grad_x : grad_scaled, dy.rows, size);
        add(gemm, times(dy.matrix, base));
        if (need_x) {
            gemm.scaled_count = 1;
            gemm.column_scale = scale_data;
            if (need_scale) gemm.sum_out = grad_scaled.mutable_data_ptr();
        }
        run(op, gemm);
        if (need_scale)
            scale_columns(op,
                          {rows_of(op, "grad", grad_scaled).matrix, rows.matrix, scale_data, 0, nullptr, 0,
                           grad_scale_data, dy.rows},
                          size);
        return {grad_x, grad_scale};
    }

    // y / scale is what was scaled, unless a scale is so small that y cannot tell: then it is computed again, in fp32,
    // since what makes a y that x's dtype can hold may be too large for it.
    bool divide = true;
    for (int64_t j = 0; j < size; ++j) divide = divide && std::fabs(scale_data[j]) >= least_divisor(dy.matrix.dtype);
    Tensor unscaled;
    Rows saved = dy;
    if (need_scale && divide) {
        PEFTKERN_CHECK(y.has_value(), op, ": y is missing");
        saved = rows_of(op, "y", *y);
        check_shape(op, "y", *y, saved.rows == dy.rows && saved.columns == size, "grad_y's");
    } else if (need_scale) {
        const Tensor wide_bias = bias_of(op, bias, size);
        unscaled = empty_fp32(dy.tensor, dy.rows, size);
        Gemm gemm = gemm_into(unscaled, dy.rows, size);
        add(gemm, times_transposed(rows.matrix, base));
        if (wide_bias.defined()) gemm.bias = wide_bias.const_data_ptr<float>();
        run(op, gemm);
        saved = rows_of(op, "y", unscaled);
    }
    Tensor grad_z = need_x ? empty_with_columns(grad_y, size) : torch::stable::new_empty(grad_y, {0});
    scale_columns(op,
                  {dy.matrix, saved.matrix, scale_data, 0, need_x ? grad_z.mutable_data_ptr() : nullptr, size,
                   grad_scale_data, dy.rows},
                  size);
    if (need_scale && divide)
        for (int64_t j = 0; j < size; ++j) grad_scale_data[j] /= scale_data[j];
    if (need_x) {
        Gemm gemm = gemm_into(grad_x, dy.rows, rows.columns);
        add(gemm, times(rows_of(op, "grad_z", grad_z).matrix, base));
        run(op, gemm);
    }
    return {grad_x, grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("ia3_linear", TORCH_BOX(&ia3_linear));
    m.impl("ia3_linear_backward", TORCH_BOX(&ia3_linear_backward));
}

}  // namespace peftkern
