// Tensors to the GEMM engine: views, checks, tiles, threads. What every linear op's host function is written in.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/weight_format.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace peftkern {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A floating-point tensor [..., columns] as a matrix; a copy is made only where no row stride describes it.
struct Rows {
    Tensor tensor;  // owns the memory
    Matrix matrix;
    int64_t rows, columns;
};
Rows rows_of(const char* op, const char* name, const Tensor& tensor);

// A weight [out, in], checked: NF4 bytes, or dense.
struct Weight {
    Rows dense;  // [in, out] if dense_transposed: a view such as that of GPT-2's Conv1D is read where it lies
    bool dense_transposed;
    Tensor codes, absmax, nested_absmax, nested_quant_map;
    Nf4 nf4;
    bool is_nf4;
    int64_t out_features, in_features;

    static Weight of(const char* op, const WeightParts& parts);
    // Of an op of one weight.
    static Weight of(const char* op, const Tensors& w, const Integers& wf);
};

// The mask of dropout_p under `seed`; nothing is dropped without a seed.
Dropout dropout_of(const char* op, double dropout_p, const OptionalTensor& seed);

// X [m, depth] @ W^T with an [n, depth] matrix or weight, and X @ W with a [depth, n] one.
Contraction times_transposed(const Matrix& x, const Matrix& w, int64_t depth);
Contraction times_transposed(const Matrix& x, const Weight& w);
Contraction times(const Matrix& x, const Matrix& w, int64_t depth);
Contraction times(const Matrix& x, const Weight& w);

// A bias in fp32, or an empty tensor.
Tensor bias_of(const char* op, const OptionalTensor& bias, int64_t out_features);

// A gemm with this output [m, n] and no contraction yet.
Gemm gemm_into(const Tensor& out, int64_t m, int64_t n);
void add(Gemm& gemm, const Contraction& contraction);

// Computes it on torch's threads, at the level in use. Levels without bf16 dot products compute in fp32. Of several,
// none needs another's result: their tiles are shared out together.
void run(const char* op, const Gemm& gemm);
void run(const char* op, const std::vector<Gemm>& gemms);

// Passes over activations, on torch's threads at the level in use.
void split_dropout(const char* op, const SplitDropout& pass, int64_t rows);
void scale_columns(const char* op, const ScaleColumns& pass, int64_t columns);
void gated_activation(const char* op, const GatedActivation& pass, int64_t elements);
void sum_rows(const char* op, const SumRows& pass, int64_t rows);
void activate(const char* op, const Activate& pass, int64_t elements);
// Of GemmKernels' cross_entropy and cross_entropy_backward.
void run(const char* op, const CrossEntropy& pass, void (*GemmKernels::*kernel)(const CrossEntropy*, int64_t, int64_t),
         int64_t rows);

// The level in use, which is counted as having run so many tiles.
Isa level_for(const char* op, int64_t tiles);

Tensor empty_with_columns(const Tensor& like, int64_t columns);
Tensor empty_fp32(const Tensor& like, int64_t rows, int64_t columns);

}  // namespace peftkern
