// lora_mlp on the CPU: gate and up as in lora_qkv, the gated activation in one pass, then down. Formula and reference:
// peftkern/ops/lora_mlp.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "common/check.h"
#include "cpu/lora_qkv.h"

namespace peftkern {
namespace {

// gate and up, which share x, and down.
struct Mlp {
    Projections inner;
    Projection down;
};

Mlp mlp_of(const char* op, const ProjectionLists& lists, const Tensor& x) {
    Projections all = projections_of(op, lists);
    PEFTKERN_CHECK(all.size() == 3, op, ": w must have 3 weights, got ", all.size());
    const int64_t middle = all[0].base.out_features;
    PEFTKERN_CHECK(all[1].base.out_features == middle && all[2].base.in_features == middle, op,
                   ": gate, up and down must meet in the same features, got ", middle, ", ", all[1].base.out_features,
                   " and ", all[2].base.in_features);
    for (size_t i = 0; i < 2; ++i) check_features(op, "x", x, all[i].base.in_features);
    const Projection down = all.back();
    all.pop_back();
    return {all, down};
}

Activation activation_of(const char* op, const std::string& name) {
    if (name == "silu") return Activation::kSilu;
    if (name == "gelu") return Activation::kGelu;
    PEFTKERN_CHECK(name == "gelu_tanh", op, ": activation must be silu, gelu or gelu_tanh, got ", name);
    return Activation::kGeluTanh;
}

GatedActivation pass_of(const Rows& gate, const Rows& up, Activation activation) {
    return {gate.matrix.data, up.matrix.data, nullptr, nullptr, nullptr, nullptr, gate.matrix.dtype, activation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_mlp(const Tensor& x, const Tensors& w, const Integers& wf,
                                                    const Tensors& lora_as, const Tensors& lora_bs,
                                                    const Numbers& scalings, const Tensors& biases,
                                                    const std::string& activation, double dropout_p,
                                                    const OptionalTensor& seeds) {
    const char* op = "lora_mlp";
    const Rows rows = rows_of(op, "x", x);
    const Mlp mlp = mlp_of(op, {w, wf, lora_as, lora_bs, scalings, dropout_p, seeds}, x);
    PEFTKERN_CHECK(biases.size() == 3, op, ": biases must have 3 entries, got ", biases.size());
    const Activation act = activation_of(op, activation);

    const Tensor h = empty_fp32(x, rows.rows, total_rank(mlp.inner) + mlp.down.adapter.rank);
    down_projections(op, rows, low_rank_of(mlp.inner, rows.rows), h);
    const Tensor gate = project(op, rows, h, mlp.inner[0], biases[0]);
    const Tensor up = project(op, rows, h, mlp.inner[1], biases[1]);
    Tensor product = torch::stable::new_empty(gate, gate.sizes());
    GatedActivation pass = pass_of(rows_of(op, "gate", gate), rows_of(op, "up", up), act);
    pass.product = product.mutable_data_ptr();
    gated_activation(op, pass, gate.numel());
    const Rows inner = rows_of(op, "product", product);
    down_projections(op, inner, low_rank_of({mlp.down}, rows.rows), h);
    return {project(op, inner, h, mlp.down, biases[2]), gate, up, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor, Tensor, Tensor> lora_mlp_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& h, const Tensors& w,
    const Integers& wf, const Tensors& lora_as, const Tensors& lora_bs, const Numbers& scalings,
    const std::string& activation, double dropout_p, const OptionalTensor& seeds, bool need_x, bool need_a, bool need_b,
    bool need_inner) {
    const char* op = "lora_mlp_backward";
    const Rows rows = rows_of(op, "x", x), dy = rows_of(op, "grad_y", grad_y);
    // The pass takes dense elements.
    const Rows g = rows_of(op, "gate", torch::stable::contiguous(gate));
    const Rows u = rows_of(op, "up", torch::stable::contiguous(up));
    const Mlp mlp = mlp_of(op, {w, wf, lora_as, lora_bs, scalings, dropout_p, seeds}, x);
    check_features(op, "gate", gate, mlp.down.base.in_features);
    check_features(op, "up", up, mlp.down.base.in_features);
    check_features(op, "grad_y", grad_y, mlp.down.base.out_features);
    const Projections down = {mlp.down};
    const int64_t inner_rank = total_rank(mlp.inner), rank = inner_rank + mlp.down.adapter.rank;
    check_shape(op, "grad_y", grad_y, dy.rows == rows.rows, "[..., out] with x's rows");
    check_shape(op, "gate", gate, g.rows == rows.rows && g.matrix.dtype == rows.matrix.dtype, "[..., middle] as x");
    check_shape(op, "up", up, u.rows == rows.rows && u.matrix.dtype == rows.matrix.dtype, "[..., middle] as x");
    check_shape(op, "h", h, h.dim() == 2 && h.size(0) == rows.rows && h.size(1) == rank, "[rows, ranks]");
    const Activation act = activation_of(op, activation);

    const auto nothing = [&] { return torch::stable::new_empty(x, {0}); };
    const Tensor grad_h = empty_fp32(x, rows.rows, rank);
    if (mlp.down.adapter.rank) grad_h_into(op, {dy}, down, grad_h);
    // The gradient of the product, which becomes the gate's.
    Tensor grad_gate = torch::stable::new_empty(gate, gate.sizes());
    grad_x_into(op, {dy}, grad_h, down, low_rank_of(down, rows.rows), grad_gate);
    Tensor grad_up = torch::stable::new_empty(up, up.sizes()), product = nothing();
    if (need_inner || (need_a && mlp.down.adapter.rank)) product = torch::stable::new_empty(gate, gate.sizes());
    GatedActivation pass = pass_of(g, u, act);
    pass.grad = pass.grad_gate = grad_gate.mutable_data_ptr();
    pass.grad_up = grad_up.mutable_data_ptr();
    if (product.numel()) pass.product = product.mutable_data_ptr();
    gated_activation(op, pass, gate.numel());

    const std::vector<Rows> dys = {rows_of(op, "grad_gate", grad_gate), rows_of(op, "grad_up", grad_up)};
    Tensor grad_x = nothing(), grad_a = nothing(), grad_down_a = nothing();
    if (need_x || (need_a && inner_rank)) grad_h_into(op, dys, mlp.inner, grad_h);
    if (need_x) {
        grad_x = torch::stable::new_empty(x, x.sizes());
        grad_x_into(op, dys, grad_h, mlp.inner, low_rank_of(mlp.inner, rows.rows), grad_x);
    }
    if (need_a) {
        grad_a = grad_a_of(op, grad_h, rows, mlp.inner);
        grad_down_a = mlp.down.adapter.rank ? grad_a_of(op, grad_h, rows_of(op, "product", product), down)
                                            : torch::stable::new_empty(lora_as[2], lora_as[2].sizes());
    }
    Tensors grad_bs;
    if (need_b) {
        grad_bs = grad_b_of(op, dys, h, mlp.inner);
        grad_bs.push_back(grad_b_of(op, {dy}, h, down)[0]);
    }
    return {grad_x, grad_a, grad_down_a, grad_bs, product, grad_gate, grad_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("lora_mlp", TORCH_BOX(&lora_mlp));
    m.impl("lora_mlp_backward", TORCH_BOX(&lora_mlp_backward));
}

}  // namespace peftkern
