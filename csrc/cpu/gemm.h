// The one CPU GEMM engine. Every linear op is a sum of contractions into one fp32 tile, then an epilogue:
//     out = epilogue(sum over contractions of X_i @ W_i),   e.g. lora_linear: x @ W^T + (scaling * h) @ B^T + bias.
// Plain structs only: the instruction-set files include this header and nothing of torch or of the standard library.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/dtype.h"

namespace peftkern {

// A row-major matrix whose last dimension is dense; `stride` counts elements between rows.
struct Matrix {
    const void* data;
    int64_t stride;
    Dtype dtype;
};

// Drops elements of a [rows, columns] matrix by the Philox mask of peftkern/ops/_dropout.py.
struct Dropout {
    uint64_t seed;
    uint32_t threshold;  // of 65536; 0: no dropout
    float keep_scale;
    const int64_t* rows;  // where in the mask each row's mask is, or null: at its own number
};

// The NF4 bytes of a row-major [rows, columns] matrix. absmax is fp32, or bytes when nested_absmax is not null.
struct Nf4 {
    const uint8_t* codes;
    const void* absmax;
    const float* nested_absmax;
    const float* nested_quant_map;
    float offset;
    int64_t block_size;
    int64_t columns;
};

// Rows of X whose weight is not that of the others. Its columns beyond `depth` are not read.
struct Segment {
    int64_t begin, end;
    int64_t depth;
    Matrix weight;
    float x_scale;
};

// One term X [m, depth] @ W [depth, n].
struct Contraction {
    int64_t depth;
    Matrix x;  // [m, depth], or [depth, m] when x_transposed
    bool x_transposed;
    float x_scale;
    Dropout x_dropout;
    const Nf4* nf4;  // the weight's bytes, or null when `weight` holds it
    Matrix weight;
    bool weight_transposed;  // stored [n, depth] (as nn.Linear does), else [depth, n]
    Dropout weight_dropout;  // only with a dense weight stored [depth, n]
    bool bf16_dot;  // multiply in bf16 where the level can: x and a dense weight are bf16, no scale, no dropout
    Dropout result_dropout;  // applied to the tile after this term
    Dropout term_dropout;    // applied to this term alone; not with bf16_dot
    // In place of `weight` and its depth and scale; rows in none of them get nothing. Not with bf16_dot or
    // term_dropout.
    const Segment* segments;
    int64_t segment_count;
};

constexpr int kMaxContractions = 6;

struct Gemm {
    int64_t m, n;
    int contraction_count;
    Contraction contractions[kMaxContractions];
    void* out;  // [m, n] or, when out_transposed, [n, m]
    int64_t out_stride;
    Dtype out_dtype;
    bool out_transposed;
    int scaled_count;           // the leading contractions that column_scale multiplies
    void* sum_out;              // like `out`, or null: their sum, not yet scaled; not with out_transposed
    const float* column_scale;  // [n] or null
    const float* bias;          // [n] or null
    Matrix residual;            // [m, n], added last; data null: none; not with out_transposed
};

// The part of a Gemm one call computes. The result does not depend on how a Gemm is cut into tiles.
struct Tile {
    int64_t m_begin, m_end, n_begin, n_end;
};

// How a Gemm is cut: a tile has at most kTileRows x kTileColumns elements, so that the accumulator (0.5 MiB), the
// packed rows and the decoded stripe stay in L2.
constexpr int64_t kTileRows = 258;
constexpr int64_t kTileColumns = 512;
// Tiles end at whole micro-tiles of every level, and at whole Philox calls of 8 columns.
constexpr int64_t kTileRowStep = 6;
constexpr int64_t kTileColumnStep = 64;

// Passes over activations beside the products. The matrices of one pass have one dtype; outputs may be null.

// kept = x under the mask, rest = x - kept, each rounded once.
struct SplitDropout {
    Matrix x;
    Dropout dropout;
    void *kept, *rest;
    int64_t out_stride, columns;
};

// grad_x[r, c] = grad_y[r, c] * (scale[c] - shift) and grad_scale[c] = sum over r of grad_y[r, c] * x[r, c].
// Without x there is no grad_scale: then this is a forward pass as well.
struct ScaleColumns {
    Matrix grad_y, x;
    const float* scale;
    float shift;
    void* grad_x;
    int64_t grad_x_stride;
    float* grad_scale;
    int64_t rows;
};

enum class Activation { kRelu, kGelu, kGeluTanh, kSilu, kTanh };

// product = act(gate) * up and, with grad, grad_gate = grad * up * act'(gate) and grad_up = grad * act(gate), over
// dense elements of one dtype. Outputs may be null, and one of them may be grad.
struct GatedActivation {
    const void *gate, *up, *grad;
    void *product, *grad_gate, *grad_up;
    Dtype dtype;
    Activation activation;
};

// out[r] = the sum, in this order, of the rows[index[i]] with offsets[r] <= i < offsets[r + 1]; zeros where there is
// none.
struct SumRows {
    Matrix rows;
    const int64_t *offsets, *index;
    void* out;  // [.., columns]
    Dtype out_dtype;
    int64_t columns;
};

// value = scale * f(z) and grad = scale * grad * f'(z), in place, of dense elements; either may be null.
struct Activate {
    Activation activation;
    float scale;
    const float* z;
    void* value;
    Dtype value_dtype;
    float* grad;
};

// losses[row] = top + log_sum - logits[row, target], with a row's largest logit and the log of the sum of e^(logit -
// top): apart, since together they would be rounded to the size of top. Backward, from these, the gradient [rows,
// columns] in the logits' dtype. Rows whose target is `ignored` have neither.
struct CrossEntropy {
    Matrix logits;
    int64_t columns;
    const int64_t* targets;
    int64_t ignored;
    float *losses, *top, *log_sum;
    const float* grad_losses;
    void* grad_logits;
};

// Runs one tile. `workspace` is 64-byte aligned and holds workspace_bytes of the same level.
struct GemmKernels {
    void (*run)(const Gemm* gemm, const Tile* tile, void* workspace);
    size_t (*workspace_bytes)(const Gemm* gemm);
    void (*split_dropout)(const SplitDropout* pass, int64_t row_begin, int64_t row_end);
    // Up to kTileColumns columns from a multiple of kTileColumnStep.
    void (*scale_columns)(const ScaleColumns* pass, int64_t column_begin, int64_t column_end);
    void (*gated_activation)(const GatedActivation* pass, int64_t begin, int64_t end);
    void (*sum_rows)(const SumRows* pass, int64_t row_begin, int64_t row_end);
    void (*activate)(const Activate* pass, int64_t begin, int64_t end);
    void (*cross_entropy)(const CrossEntropy* pass, int64_t row_begin, int64_t row_end);
    void (*cross_entropy_backward)(const CrossEntropy* pass, int64_t row_begin, int64_t row_end);
};

// Weak: null where the level is not part of the build.
#define PEFTKERN_KERNELS extern const __attribute__((weak))
extern "C" {
PEFTKERN_KERNELS GemmKernels peftkern_gemm_scalar, peftkern_gemm_avx2, peftkern_gemm_avx512, peftkern_gemm_avx512bf16;
}

}  // namespace peftkern
