// bottleneck_adapter on the CPU: products with a small matrix [rows, m] between them. Formula and reference:
// peftkern/ops/bottleneck_adapter.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "common/check.h"
#include "cpu/engine.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;

struct Bottleneck {
    Rows down, up;  // [m, d], [d, m]
    int64_t size;
};

Bottleneck bottleneck_of(const char* op, const Tensor& down_weight, const Tensor& up_weight, int64_t features) {
    check_shape(op, "down_weight", down_weight, down_weight.dim() == 2 && down_weight.size(1) == features,
                "[bottleneck, " + std::to_string(features) + "]");
    const int64_t size = down_weight.size(0);
    check_shape(op, "up_weight", up_weight,
                up_weight.dim() == 2 && up_weight.size(0) == features && up_weight.size(1) == size,
                "[" + std::to_string(features) + ", " + std::to_string(size) + "]");
    return {rows_of(op, "down_weight", down_weight), rows_of(op, "up_weight", up_weight), size};
}

Activation activation_of(const char* op, const std::string& name) {
    const char* const names[] = {"relu", "gelu", "gelu_tanh", "silu", "tanh"};
    for (int i = 0; i < 5; ++i)
        if (name == names[i]) return static_cast<Activation>(i);
    PEFTKERN_CHECK(false, op, ": activation must be relu, gelu, gelu_tanh, silu or tanh, got ", name);
}

// What the small matrices are rounded to before they meet a weight: bf16 where x and the weight are bf16.
ScalarType small_dtype(const Rows& x, const Rows& weight) {
    const bool both = x.matrix.dtype == Dtype::kBFloat16 && weight.matrix.dtype == Dtype::kBFloat16;
    return both ? ScalarType::BFloat16 : ScalarType::Float;
}

void add_product(Gemm& gemm, Contraction c) {
    c.bf16_dot = c.x.dtype == Dtype::kBFloat16 && c.weight.dtype == Dtype::kBFloat16;
    add(gemm, c);
}

// x @ w in fp32, for a weight stored as it is multiplied or transposed.
Tensor to_bottleneck(const char* op, const Rows& x, const Contraction& product, int64_t size, const Tensor& bias) {
    Tensor out = empty_fp32(x.tensor, x.rows, size);
    Gemm gemm = gemm_into(out, x.rows, size);
    add_product(gemm, product);
    if (bias.defined()) gemm.bias = bias.const_data_ptr<float>();
    run(op, gemm);
    return out;
}

Tensor scaled(const Tensor& bias, float scale) {
    Tensor out = torch::stable::empty_like(bias);
    const float* from = bias.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    for (int64_t i = 0; i < bias.numel(); ++i) to[i] = from[i] * scale;
    return out;
}

// small [rows, m]^T @ wide [rows, d], written as `like` is stored: [m, d], or [d, m] when transposed.
Tensor grad_weight(const char* op, const Tensor& small, const Rows& wide, const Tensor& like, bool transposed) {
    const int64_t size = small.size(1);
    Tensor out = torch::stable::new_empty(like, like.sizes());
    Gemm gemm = gemm_into(out, size, wide.columns);
    const Tensor rows = torch::stable::contiguous(torch::stable::transpose(small, 0, 1));
    add_product(gemm, times(rows_of(op, "small", rows).matrix, wide.matrix, wide.rows));
    gemm.out_transposed = transposed;
    gemm.out_stride = transposed ? size : wide.columns;
    run(op, gemm);
    return out;
}

// scale * the sum of all rows, in the bias's dtype.
Tensor grad_bias(const char* op, const Rows& grad, const Tensor& bias, float scale) {
    Tensor out = torch::stable::new_empty(bias, bias.sizes());
    const Tensor ones = torch::stable::fill_(empty_fp32(grad.tensor, 1, grad.rows), 1.0);
    Gemm gemm = gemm_into(out, 1, grad.columns);
    add(gemm, times(rows_of(op, "ones", ones).matrix, grad.matrix, grad.rows));
    gemm.contractions[0].x_scale = scale;
    run(op, gemm);
    return out;
}

}  // namespace

std::tuple<Tensor, Tensor> bottleneck_adapter(Tensor x, Tensor down_weight, Tensor down_bias, Tensor up_weight,
                                              Tensor up_bias, std::string activation, double scaling,
                                              OptionalTensor residual) {
    const char* op = "bottleneck_adapter";
    const Rows rows = rows_of(op, "x", x);
    const Bottleneck weights = bottleneck_of(op, down_weight, up_weight, rows.columns);
    const Activation function = activation_of(op, activation);
    const auto scale = static_cast<float>(scaling);
    const Tensor wide_down_bias = bias_of(op, down_bias, weights.size);
    const Tensor wide_up_bias = scaled(bias_of(op, up_bias, rows.columns), scale);
    const Rows added = residual.has_value() ? rows_of(op, "residual", *residual) : rows;
    check_shape(op, "residual", added.tensor, added.rows == rows.rows && added.columns == rows.columns, "as x");

    const Tensor z = to_bottleneck(op, rows, times_transposed(rows.matrix, weights.down.matrix, rows.columns),
                                   weights.size, wide_down_bias);
    const Tensor value = torch::stable::new_empty(z, z.sizes(), small_dtype(rows, weights.up));
    const Rows small = rows_of(op, "value", value);
    activate(op, {function, scale, z.const_data_ptr<float>(), value.mutable_data_ptr(), small.matrix.dtype, nullptr},
             z.numel());
    Tensor y = empty_with_columns(x, rows.columns);
    Gemm gemm = gemm_into(y, rows.rows, rows.columns);
    add_product(gemm, times_transposed(small.matrix, weights.up.matrix, weights.size));
    gemm.bias = wide_up_bias.const_data_ptr<float>();
    gemm.residual = added.matrix;
    run(op, gemm);
    return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_adapter_backward(
    Tensor grad_y, Tensor x, Tensor z, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias,
    std::string activation, double scaling, bool adds_x, bool need_x, bool need_down_weight, bool need_down_bias,
    bool need_up_weight, bool need_up_bias) {
    const char* op = "bottleneck_adapter_backward";
    const Rows dy = rows_of(op, "grad_y", grad_y), rows = rows_of(op, "x", x), wide_z = rows_of(op, "z", z);
    const Bottleneck weights = bottleneck_of(op, down_weight, up_weight, rows.columns);
    const Activation function = activation_of(op, activation);
    check_shape(op, "grad_y", grad_y, dy.rows == rows.rows && dy.columns == rows.columns, "as x");
    check_dtype(op, "z", z, z.scalar_type() == ScalarType::Float, "fp32");
    bias_of(op, down_bias, weights.size);  // for its checks: a gradient is written in its dtype and size
    bias_of(op, up_bias, rows.columns);
    check_shape(op, "z", z, wide_z.rows == dy.rows && wide_z.columns == weights.size, "[rows, bottleneck]");
    z = torch::stable::contiguous(z);
    const auto scale = static_cast<float>(scaling);
    const auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };

    const bool need_z = need_x || need_down_weight || need_down_bias;
    Tensor grad_z = none(z), value = none(z);
    if (need_z) grad_z = to_bottleneck(op, dy, times(dy.matrix, weights.up.matrix, dy.columns), weights.size, Tensor());
    if (need_up_weight) value = torch::stable::new_empty(z, z.sizes(), small_dtype(dy, weights.up));
    if (need_z || need_up_weight)
        activate(op,
                 {function, scale, z.const_data_ptr<float>(), need_up_weight ? value.mutable_data_ptr() : nullptr,
                  rows_of(op, "value", value).matrix.dtype, need_z ? grad_z.mutable_data_ptr<float>() : nullptr},
                 z.numel());
    const Tensor rounded = torch::stable::to(grad_z, small_dtype(dy, weights.down));

    Tensor grad_x = none(grad_y);
    if (need_x) {
        grad_x = torch::stable::new_empty(grad_y, x.sizes());
        Gemm gemm = gemm_into(grad_x, rows.rows, rows.columns);
        add_product(gemm, times(rows_of(op, "grad_z", rounded).matrix, weights.down.matrix, weights.size));
        if (adds_x) gemm.residual = dy.matrix;
        run(op, gemm);
    }
    return {grad_x, need_down_weight ? grad_weight(op, rounded, rows, down_weight, false) : none(down_weight),
            need_down_bias ? grad_bias(op, rows_of(op, "grad_z", grad_z), down_bias, 1) : none(down_bias),
            need_up_weight ? grad_weight(op, value, dy, up_weight, true) : none(up_weight),
            need_up_bias ? grad_bias(op, dy, up_bias, scale) : none(up_bias)};
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("bottleneck_adapter", TORCH_BOX(&bottleneck_adapter));
    m.impl("bottleneck_adapter_backward", TORCH_BOX(&bottleneck_adapter_backward));
}

}  // namespace peftkern
