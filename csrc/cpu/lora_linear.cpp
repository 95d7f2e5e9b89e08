// lora_linear on the CPU: the low-rank path is one more contraction of the same tile. Formula and reference:
// peftkern/ops/lora_linear.py.
#include "cpu/lora_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/check.h"

namespace peftkern {

Adapter adapter_of(const char* op, const Tensor& lora_a, const Tensor& lora_b, int64_t out_features,
                   int64_t in_features) {
    check_shape(op, "lora_a", lora_a, lora_a.dim() == 2 && lora_a.size(1) == in_features,
                "[rank, " + std::to_string(in_features) + "]");
    const int64_t rank = lora_a.size(0);
    check_shape(op, "lora_b", lora_b, lora_b.dim() == 2 && lora_b.size(0) == out_features && lora_b.size(1) == rank,
                "[" + std::to_string(out_features) + ", " + std::to_string(rank) + "]");
    return {rows_of(op, "lora_a", lora_a), rows_of(op, "lora_b", lora_b), rank};
}

Tensor down_projection(const char* op, const Rows& x, const Adapter& adapter, const Dropout& dropout) {
    Tensor h = empty_fp32(x.tensor, x.rows, adapter.rank);
    down_projection_into(op, x, adapter.a, dropout, h);
    return h;
}

Gemm down_projection_product(const Rows& x, const Rows& a, const Dropout& dropout, const Tensor& h) {
    Gemm gemm = gemm_into(h, x.rows, a.rows);
    gemm.out_stride = h.stride(0);
    add(gemm, times_transposed(x.matrix, a.matrix, x.columns));
    gemm.contractions[0].x_dropout = dropout;
    return gemm;
}

void down_projection_into(const char* op, const Rows& x, const Rows& a, const Dropout& dropout, const Tensor& h) {
    run(op, down_projection_product(x, a, dropout, h));
}

Tensor adapted_product(const char* op, const Rows& x, const Rows& h, const Weight& base, const Adapter& adapter,
                       float s, const Tensor& wide_bias) {
    Tensor y = empty_with_columns(x.tensor, base.out_features);
    Gemm gemm = gemm_into(y, x.rows, base.out_features);
    add(gemm, times_transposed(h.matrix, adapter.b.matrix, adapter.rank));
    gemm.contractions[0].x_scale = s;
    add(gemm, times_transposed(x.matrix, base));
    if (wide_bias.defined()) gemm.bias = wide_bias.const_data_ptr<float>();
    run(op, gemm);
    return y;
}

Tensor grad_h_of(const char* op, const Rows& dy, const Adapter& adapter, float s) {
    Tensor grad_h = empty_fp32(dy.tensor, dy.rows, adapter.rank);
    grad_h_into(op, dy, adapter, s, grad_h);
    return grad_h;
}

Gemm grad_h_product(const Rows& dy, const Rows& b, float s, const Tensor& grad_h) {
    Gemm gemm = gemm_into(grad_h, dy.rows, b.columns);
    gemm.out_stride = grad_h.stride(0);
    add(gemm, times(dy.matrix, b.matrix, dy.columns));
    gemm.contractions[0].x_scale = s;
    return gemm;
}

void grad_h_into(const char* op, const Rows& dy, const Adapter& adapter, float s, const Tensor& grad_h) {
    run(op, grad_h_product(dy, adapter.b, s, grad_h));
}

Tensor grad_a_of(const char* op, const Tensor& grad_h, const Rows& x, const Tensor& lora_a, const Dropout& dropout) {
    Tensor grad_a = torch::stable::new_empty(lora_a, lora_a.sizes());
    grad_a_into(op, rows_of(op, "grad_h", grad_h), x, dropout, grad_a);
    return grad_a;
}

Gemm grad_a_product(const Rows& grad_h, const Rows& x, const Dropout& dropout, const Tensor& grad_a) {
    Gemm gemm = gemm_into(grad_a, grad_h.columns, x.columns);
    add(gemm, times(grad_h.matrix, x.matrix, x.rows));
    gemm.contractions[0].x_transposed = true;
    gemm.contractions[0].weight_dropout = dropout;
    return gemm;
}

void grad_a_into(const char* op, const Rows& grad_h, const Rows& x, const Dropout& dropout, const Tensor& grad_a) {
    run(op, grad_a_product(grad_h, x, dropout, grad_a));
}

// dB^T = (s h)^T dy: the rows are the rank, so that few rows meet a wide matrix; written transposed.
Gemm grad_b_product(const Rows& dy, const Rows& h, float s, const float* row_scale, const Tensor& grad_b) {
    const int64_t rank = grad_b.size(1);
    Gemm gemm = gemm_into(grad_b, rank, dy.columns);
    add(gemm, times(h.matrix, dy.matrix, dy.rows));
    gemm.contractions[0].x_transposed = true;
    gemm.contractions[0].x_scale = s;
    gemm.scaled_count = 1;
    gemm.column_scale = row_scale;
    gemm.out_transposed = true;
    gemm.out_stride = rank;
    return gemm;
}

Tensor grad_b_of(const char* op, const Rows& dy, const Rows& h, const Tensor& lora_b, float s, const float* row_scale) {
    Tensor grad_b = torch::stable::new_empty(lora_b, lora_b.sizes());
    run(op, grad_b_product(dy, h, s, row_scale, grad_b));
    return grad_b;
}

std::tuple<Tensor, Tensor> lora_linear(Tensor x, const Tensors& w, const Integers& wf, Tensor lora_a, Tensor lora_b,
                                       double scaling, OptionalTensor bias, double dropout_p, OptionalTensor seed) {
    const char* op = "lora_linear";
    const Rows rows = rows_of(op, "x", x);
    const Weight base = Weight::of(op, w, wf);
    check_features(op, "x", x, base.in_features);
    const Adapter adapter = adapter_of(op, lora_a, lora_b, base.out_features, base.in_features);
    const Tensor wide_bias = bias_of(op, bias, base.out_features);
    const Dropout dropout = dropout_of(op, dropout_p, seed);

    Tensor h = down_projection(op, rows, adapter, dropout);
    Tensor y = adapted_product(op, rows, rows_of(op, "h", h), base, adapter, static_cast<float>(scaling), wide_bias);
    return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(Tensor grad_y, Tensor x, Tensor h, const Tensors& w,
                                                        const Integers& wf, Tensor lora_a, Tensor lora_b,
                                                        double scaling, double dropout_p, OptionalTensor seed,
                                                        bool need_x, bool need_a, bool need_b) {
    const char* op = "lora_linear_backward";
    const Rows dy = rows_of(op, "grad_y", grad_y), rows = rows_of(op, "x", x), low_rank = rows_of(op, "h", h);
    const Weight base = Weight::of(op, w, wf);
    check_features(op, "grad_y", grad_y, base.out_features);
    check_features(op, "x", x, base.in_features);
    const Adapter adapter = adapter_of(op, lora_a, lora_b, base.out_features, base.in_features);
    const Dropout dropout = dropout_of(op, dropout_p, seed);
    check_shape(op, "x", x, rows.rows == dy.rows, "[..., in] with grad_y's rows");
    check_shape(op, "h", h, low_rank.rows == dy.rows && low_rank.columns == adapter.rank, "[rows, rank]");
    const auto s = static_cast<float>(scaling);
    const Tensor nothing = torch::stable::new_empty(grad_y, {0});

    Tensor dh = need_x || need_a ? empty_fp32(dy.tensor, dy.rows, adapter.rank) : nothing;
    Tensor grad_x = need_x ? torch::stable::new_empty(x, x.sizes(), grad_y.scalar_type()) : nothing;
    Tensor grad_a = need_a ? torch::stable::new_empty(lora_a, lora_a.sizes()) : torch::stable::new_empty(lora_a, {0});
    Tensor grad_b = need_b ? torch::stable::new_empty(lora_b, lora_b.sizes()) : torch::stable::new_empty(lora_b, {0});
    std::vector<Gemm> first, second;  // those that read dh wait for it
    if (need_x || need_a) first.push_back(grad_h_product(dy, adapter.b, s, dh));
    if (need_b) first.push_back(grad_b_product(dy, low_rank, s, nullptr, grad_b));
    if (need_x) {
        Gemm gemm = gemm_into(grad_x, dy.rows, rows.columns);
        add(gemm, times(rows_of(op, "grad_h", dh).matrix, adapter.a.matrix, adapter.rank));
        gemm.contractions[0].result_dropout = dropout;
        add(gemm, times(dy.matrix, base));
        second.push_back(gemm);
    }
    if (need_a) second.push_back(grad_a_product(rows_of(op, "grad_h", dh), rows, dropout, grad_a));
    run(op, first);
    run(op, second);
    return {grad_x, grad_a, grad_b};
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("lora_linear", TORCH_BOX(&lora_linear));
    m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace peftkern
