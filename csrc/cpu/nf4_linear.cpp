// nf4_linear on the CPU: y = x W^T + bias, and dx = dy W. Formula and reference: peftkern/ops/nf4_linear.py.
#include <torch/csrc/stable/library.h>

#include "cpu/engine.h"

namespace peftkern {

Tensor nf4_linear(Tensor x, const Tensors& w, const Integers& wf, OptionalTensor bias) {
    const char* op = "nf4_linear";
    const Rows rows = rows_of(op, "x", x);
    const Weight weight = Weight::of(op, w, wf);
    check_features(op, "x", x, weight.in_features);
    const Tensor wide_bias = bias_of(op, bias, weight.out_features);
    Tensor y = empty_with_columns(x, weight.out_features);
    Gemm gemm = gemm_into(y, rows.rows, weight.out_features);
    add(gemm, times_transposed(rows.matrix, weight));
    if (wide_bias.defined()) gemm.bias = wide_bias.const_data_ptr<float>();
    run(op, gemm);
    return y;
}

Tensor nf4_linear_backward(Tensor grad_y, const Tensors& w, const Integers& wf) {
    const char* op = "nf4_linear_backward";
    const Rows rows = rows_of(op, "grad_y", grad_y);
    const Weight weight = Weight::of(op, w, wf);
    check_features(op, "grad_y", grad_y, weight.out_features);
    Tensor grad_x = empty_with_columns(grad_y, weight.in_features);
    Gemm gemm = gemm_into(grad_x, rows.rows, weight.in_features);
    add(gemm, times(rows.matrix, weight));
    run(op, gemm);
    return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("nf4_linear", TORCH_BOX(&nf4_linear));
    m.impl("nf4_linear_backward", TORCH_BOX(&nf4_linear_backward));
}

}  // namespace peftkern
