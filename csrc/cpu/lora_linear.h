// The low-rank path that LoRA's relatives share.
#pragma once

#include <tuple>

#include "cpu/engine.h"

namespace peftkern {

// A [rank, in] and B [out, rank], checked.
struct Adapter {
    Rows a, b;
    int64_t rank;
};
Adapter adapter_of(const char* op, const Tensor& lora_a, const Tensor& lora_b, int64_t out_features,
                   int64_t in_features);

// h = dropout(x) A^T in fp32. `_into`: written into a given matrix, which may be columns or rows of a larger one.
// `_product`: what writes it, to be run.
Tensor down_projection(const char* op, const Rows& x, const Adapter& adapter, const Dropout& dropout);
Gemm down_projection_product(const Rows& x, const Rows& a, const Dropout& dropout, const Tensor& h);
void down_projection_into(const char* op, const Rows& x, const Rows& a, const Dropout& dropout, const Tensor& h);

// y = x W^T + s h B^T + bias, in x's dtype; wide_bias as bias_of gives it.
Tensor adapted_product(const char* op, const Rows& x, const Rows& h, const Weight& base, const Adapter& adapter,
                       float s, const Tensor& wide_bias);

// dh = s dy B in fp32, dA = dh^T dropout(x), dB = s dy^T h, its rows scaled if asked to; gradients come in the
// adapters' dtypes.
Tensor grad_h_of(const char* op, const Rows& dy, const Adapter& adapter, float s);
Gemm grad_h_product(const Rows& dy, const Rows& b, float s, const Tensor& grad_h);
void grad_h_into(const char* op, const Rows& dy, const Adapter& adapter, float s, const Tensor& grad_h);
Tensor grad_a_of(const char* op, const Tensor& grad_h, const Rows& x, const Tensor& lora_a, const Dropout& dropout);
Gemm grad_a_product(const Rows& grad_h, const Rows& x, const Dropout& dropout, const Tensor& grad_a);
void grad_a_into(const char* op, const Rows& grad_h, const Rows& x, const Dropout& dropout, const Tensor& grad_a);
Gemm grad_b_product(const Rows& dy, const Rows& h, float s, const float* row_scale, const Tensor& grad_b);
Tensor grad_b_of(const char* op, const Rows& dy, const Rows& h, const Tensor& lora_b, float s,
                 const float* row_scale = nullptr);

}  // namespace peftkern
