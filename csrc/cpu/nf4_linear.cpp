// nf4_linear on the CPU: y = x W^T + bias, and dx = dy W. Formula and reference: peftkern/ops/nf4_linear.py.
#include <torch/csrc/stable/library.h>

#include "cpu/engine.h"

namespace peftkern {

Tensor nf4_linear(Tensor x, Tensor codes, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_quant_map,
                  OptionalTensor offset, int64_t block_size, int64_t out_features, OptionalTensor bias) {
    const char* op = "nf4_linear";
    const Rows rows = rows_of(op, "x", x);
    const Weight weight =
        weight_of(op, codes, absmax, nested_absmax, nested_quant_map, offset, block_size, out_features, rows.columns);
    const Tensor wide_bias = bias_of(op, bias, out_features);
    Tensor y = empty_with_columns(x, out_features);
    Gemm gemm = gemm_into(y, rows.rows, out_features);
    add(gemm, times_transposed(rows.matrix, weight));
    if (wide_bias.defined()) gemm.bias = wide_bias.const_data_ptr<float>();
    run(op, gemm);
    return y;
}

Tensor nf4_linear_backward(Tensor grad_y, Tensor codes, Tensor absmax, OptionalTensor nested_absmax,
                           OptionalTensor nested_quant_map, OptionalTensor offset, int64_t block_size,
                           int64_t in_features) {
    const char* op = "nf4_linear_backward";
    const Rows rows = rows_of(op, "grad_y", grad_y);
    const Weight weight =
        weight_of(op, codes, absmax, nested_absmax, nested_quant_map, offset, block_size, rows.columns, in_features);
    Tensor grad_x = empty_with_columns(grad_y, in_features);
    Gemm gemm = gemm_into(grad_x, rows.rows, in_features);
    add(gemm, times(rows.matrix, weight));
    run(op, gemm);
    return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("nf4_linear", TORCH_BOX(&nf4_linear));
    m.impl("nf4_linear_backward", TORCH_BOX(&nf4_linear_backward));
}

}  // namespace peftkern
