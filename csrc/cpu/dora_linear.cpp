// dora_linear on the CPU: LoRA's products with a scale for each output column. Formula and reference:
// peftkern/ops/dora_linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>

#include "common/check.h"
#include "common/nf4_codebook.h"
#include "cpu/lora_linear.h"
#include "cpu/nf4_codes.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;

// Below this share of ||W||^2 the factored norm is the difference of nearly equal numbers, and rows take the direct
// one: the products' relative error, 2^-24 or (bf16) about 6e-5 of ||W||^2, stays below 1e-3 of the norm.
constexpr float kLeastShare = 1e-3f, kLeastShareBf16 = 0.1f;
// From this depth on the roundings of bf16 factors average out: 2^-9 / 16 of a product.
constexpr int64_t kLeastDepthBf16 = 256;

Tensor column_vector(const char* op, const char* name, const Tensor& tensor, int64_t size) {
    check_dtype(op, name, tensor, tensor.scalar_type() == ScalarType::Float, "fp32");
    check_shape(op, name, tensor, tensor.dim() == 1 && tensor.size(0) == size, "[" + std::to_string(size) + "]");
    return torch::stable::contiguous(tensor);
}

Tensor wide(const Tensor& tensor) {
    return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

// X [m, depth] @ W^T or, when `transposed` is false, X [m, out] @ W, in fp32.
Tensor product(const char* op, const Tensor& x, const Weight& weight, bool transposed) {
    const Rows rows = rows_of(op, "factor", x);
    const int64_t n = transposed ? weight.out_features : weight.in_features;
    Tensor out = empty_fp32(x, rows.rows, n);
    Gemm gemm = gemm_into(out, rows.rows, n);
    add(gemm, transposed ? times_transposed(rows.matrix, weight) : times(rows.matrix, weight));
    run(op, gemm);
    return out;
}

// A A^T [rank, rank] and B A A^T [out, rank].
Tensor gram(const char* op, const Rows& a) {
    Tensor g = empty_fp32(a.tensor, a.rows, a.rows);
    Gemm gemm = gemm_into(g, a.rows, a.rows);
    add(gemm, times_transposed(a.matrix, a.matrix, a.columns));
    run(op, gemm);
    return g;
}
Tensor times_gram(const char* op, const Rows& b, const Tensor& g) {
    Tensor out = empty_fp32(b.tensor, b.rows, b.columns);
    Gemm gemm = gemm_into(out, b.rows, b.columns);
    add(gemm, times(b.matrix, rows_of(op, "gram", g).matrix, b.columns));
    run(op, gemm);
    return out;
}

float bf16_value(uint32_t bits) {
    const uint32_t shifted = bits << 16;
    float value;
    std::memcpy(&value, &shifted, 4);
    return value;
}

float dense_value(const Matrix& matrix, int64_t row, int64_t column) {
    const int64_t at = row * matrix.stride + column;
    if (matrix.dtype == Dtype::kFloat32) return static_cast<const float*>(matrix.data)[at];
    const uint32_t bits = static_cast<const uint16_t*>(matrix.data)[at];
    if (matrix.dtype == Dtype::kBFloat16) return bf16_value(bits);
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;  // weights are finite
    return bits & 0x8000u ? -value : value;
}

float weight_value(const Weight& w, int64_t row, int64_t column) {
    if (w.is_nf4) return nf4_value(w.nf4, row, column);
    return w.dense_transposed ? dense_value(w.dense.matrix, column, row) : dense_value(w.dense.matrix, row, column);
}

// The squares of one row of NF4 weights whose blocks begin and end with bytes: the codes' squares, byte by byte from a
// table and in four sums, since one would wait for itself, times the square of the block's scale.
double square_of_bytes(const Nf4& q, int64_t row, const std::array<double, 256>& squares) {
    double sum = 0;
    for (int64_t column = 0; column < q.columns; column += q.block_size) {
        const int64_t at = row * q.columns + column;
        const uint8_t* codes = q.codes + at / 2;
        double parts[4] = {};
        for (int64_t i = 0; i < q.block_size / 2; i += 4)
            for (int64_t part = 0; part < 4; ++part) parts[part] += squares[codes[i + part]];
        const double scale = block_absmax(q, at / q.block_size);
        sum += scale * scale * ((parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
    return sum;
}

// The sum of value(k)^2 for k < n, in four parts likewise.
template <class Value>
double sum_of_squares(int64_t n, Value value) {
    double parts[4] = {};
    int64_t k = 0;
    for (; k + 4 <= n; k += 4)
        for (int part = 0; part < 4; ++part) {
            const double v = value(k + part);
            parts[part] += v * v;
        }
    for (; k < n; ++k) {
        const double v = value(k);
        parts[0] += v * v;
    }
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// The squares of one row of any weight.
double square_of_row(const Weight& w, int64_t row) {
    const Matrix& dense = w.dense.matrix;
    if (!w.is_nf4 && !w.dense_transposed && dense.dtype == Dtype::kBFloat16) {
        const auto* bits = static_cast<const uint16_t*>(dense.data) + row * dense.stride;
        return sum_of_squares(w.in_features, [bits](int64_t k) { return bf16_value(bits[k]); });
    }
    return sum_of_squares(w.in_features, [&](int64_t k) { return weight_value(w, row, k); });
}

// ||W_j + s B_j A|| without the factored form.
float direct_norm(const Weight& w, int64_t row, const float* b, const float* a, int64_t rank, double s) {
    double sum = 0;
    for (int64_t k = 0; k < w.in_features; ++k) {
        double v = weight_value(w, row, k);
        for (int64_t r = 0; r < rank; ++r)
            v += s * static_cast<double>(b[r]) * static_cast<double>(a[r * w.in_features + k]);
        sum += v * v;
    }
    return static_cast<float>(std::sqrt(sum));
}

}  // namespace

// ||W_j||^2, in plain code: a layer keeps it. Where nothing may be kept (HF PEFT's layers), it costs as much as the
// norm.
Tensor dora_linear_square_norm(const Tensors& w, const Integers& wf) {
    const Weight base = Weight::of("dora_linear_square_norm", w, wf);
    const int64_t out_features = base.out_features, in_features = base.in_features;
    Tensor squares = torch::stable::new_empty(w[0], {out_features}, ScalarType::Float);
    auto* out = squares.mutable_data_ptr<float>();
    std::array<double, 256> byte_squares;
    for (size_t byte = 0; byte < byte_squares.size(); ++byte) {
        const double high = kNf4Codebook[byte >> 4], low = kNf4Codebook[byte & 15];
        byte_squares[byte] = high * high + low * low;
    }
    const bool whole_bytes = base.is_nf4 && base.nf4.block_size % 8 == 0 && in_features % base.nf4.block_size == 0;
    torch::stable::parallel_for(0, out_features, 16, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j)
            out[j] =
                static_cast<float>(whole_bytes ? square_of_bytes(base.nf4, j, byte_squares) : square_of_row(base, j));
    });
    return squares;
}

Tensor dora_linear_norm(const Tensors& w, const Integers& wf, Tensor lora_a, Tensor lora_b, double scaling,
                        Tensor square_norm, bool bf16) {
    const char* op = "dora_linear_norm";
    const Weight base = Weight::of(op, w, wf);
    const int64_t out_features = base.out_features, in_features = base.in_features;
    const Adapter adapter = adapter_of(op, lora_a, lora_b, out_features, in_features);
    const Tensor squares = column_vector(op, "square_norm", square_norm, out_features);
    const Tensor a = wide(lora_a), b = wide(lora_b);
    const int64_t rank = adapter.rank;
    bf16 = bf16 && in_features >= kLeastDepthBf16;
    const Tensor cross = product(op, bf16 ? torch::stable::to(lora_a, ScalarType::BFloat16) : a, base, true);
    const Tensor b_gram = times_gram(op, rows_of(op, "lora_b", b), gram(op, rows_of(op, "lora_a", a)));
    Tensor norm = torch::stable::new_empty(squares, {out_features});
    const auto *pa = a.const_data_ptr<float>(), *pb = b.const_data_ptr<float>();
    const auto *pc = cross.const_data_ptr<float>(), *pg = b_gram.const_data_ptr<float>();
    const auto* square = squares.const_data_ptr<float>();
    auto* out = norm.mutable_data_ptr<float>();
    const double s = scaling, least = bf16 ? kLeastShareBf16 : kLeastShare;
    torch::stable::parallel_for(0, out_features, 256, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
            double sum = square[j];
            for (int64_t k = 0; k < rank; ++k) {
                const double inner =
                    2 * static_cast<double>(pc[k * out_features + j]) + s * static_cast<double>(pg[j * rank + k]);
                sum += s * static_cast<double>(pb[j * rank + k]) * inner;
            }
            out[j] = sum >= least * square[j] ? static_cast<float>(std::sqrt(sum))
                                              : direct_norm(base, j, pb + j * rank, pa, rank, s);
        }
    });
    return norm;
}

// With c = dn / n: dB = s c (A W^T)^T + s^2 c B A A^T and dA = s (c B)^T W + s^2 B^T c B A.
std::tuple<Tensor, Tensor> dora_linear_norm_backward(Tensor grad_norm, Tensor norm, const Tensors& w,
                                                     const Integers& wf, Tensor lora_a, Tensor lora_b, double scaling) {
    const char* op = "dora_linear_norm_backward";
    const Weight base = Weight::of(op, w, wf);
    const int64_t out_features = base.out_features, in_features = base.in_features;
    const Adapter adapter = adapter_of(op, lora_a, lora_b, out_features, in_features);
    const Tensor n = column_vector(op, "norm", norm, out_features);
    const Tensor dn = column_vector(op, "grad_norm", grad_norm, out_features);
    const int64_t rank = adapter.rank;
    const Tensor a = wide(lora_a), b = wide(lora_b), cross = product(op, a, base, true);
    const Tensor b_gram = times_gram(op, rows_of(op, "lora_b", b), gram(op, rows_of(op, "lora_a", a)));
    Tensor scaled_b = empty_fp32(a, out_features, rank);  // s c B
    Tensor wide_grad_b = empty_fp32(a, out_features, rank);
    const auto *pb = b.const_data_ptr<float>(), *pc = cross.const_data_ptr<float>(),
               *pg = b_gram.const_data_ptr<float>();
    const auto *pn = n.const_data_ptr<float>(), *pdn = dn.const_data_ptr<float>();
    auto *ps = scaled_b.mutable_data_ptr<float>(), *pgb = wide_grad_b.mutable_data_ptr<float>();
    const auto s = static_cast<float>(scaling);
    for (int64_t j = 0; j < out_features; ++j) {
        // The norm has no slope at 0; torch's vector_norm gives 0 there as well.
        const float c = pn[j] > 0 ? s * pdn[j] / pn[j] : 0.0f;
        for (int64_t k = 0; k < rank; ++k) {
            ps[j * rank + k] = c * pb[j * rank + k];
            pgb[j * rank + k] = c * (pc[k * out_features + j] + s * pg[j * rank + k]);
        }
    }
    // dA = (s c B)^T W + ((s c B)^T s B) A.
    const Matrix scaled = {ps, rank, Dtype::kFloat32};
    Tensor inner = empty_fp32(a, rank, rank);
    Gemm small = gemm_into(inner, rank, rank);
    add(small, times(scaled, {pb, rank, Dtype::kFloat32}, out_features));
    small.contractions[0].x_transposed = true;
    small.contractions[0].x_scale = s;
    run(op, small);
    Tensor grad_a = torch::stable::new_empty(lora_a, lora_a.sizes());
    Gemm gemm = gemm_into(grad_a, rank, in_features);
    add(gemm, times(rows_of(op, "inner", inner).matrix, rows_of(op, "lora_a", a).matrix, rank));
    add(gemm, times(scaled, base));
    gemm.contractions[1].x_transposed = true;
    run(op, gemm);
    return {grad_a, torch::stable::to(wide_grad_b, lora_b.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> dora_linear(Tensor x, const Tensors& w, const Integers& wf, Tensor lora_a,
                                               Tensor lora_b, Tensor scale, double scaling, OptionalTensor bias,
                                               double dropout_p, OptionalTensor seed, bool drop_base, bool need_z) {
    const char* op = "dora_linear";
    const Rows rows = rows_of(op, "x", x);
    const Weight base = Weight::of(op, w, wf);
    check_features(op, "x", x, base.in_features);
    const int64_t out_features = base.out_features;
    const Adapter adapter = adapter_of(op, lora_a, lora_b, out_features, base.in_features);
    const Tensor factors = column_vector(op, "scale", scale, out_features);
    const Tensor wide_bias = bias_of(op, bias, out_features);
    const Dropout dropout = dropout_of(op, dropout_p, seed);
    const bool split = drop_base && dropout.threshold > 0;

    Tensor h = down_projection(op, rows, adapter, dropout);
    Tensor y = empty_with_columns(x, out_features);
    Tensor z = need_z ? empty_with_columns(x, out_features) : torch::stable::new_empty(x, {0});
    Tensor kept, rest;
    Gemm gemm = gemm_into(y, rows.rows, out_features);
    add(gemm, times_transposed(rows_of(op, "h", h).matrix, adapter.b.matrix, adapter.rank));
    gemm.contractions[0].x_scale = static_cast<float>(scaling);
    if (split) {
        kept = empty_with_columns(x, rows.columns);
        rest = empty_with_columns(x, rows.columns);
        split_dropout(
            op, {rows.matrix, dropout, kept.mutable_data_ptr(), rest.mutable_data_ptr(), rows.columns, rows.columns},
            rows.rows);
        add(gemm, times_transposed({kept.const_data_ptr(), rows.columns, rows.matrix.dtype}, base));
    } else {
        add(gemm, times_transposed(rows.matrix, base));
    }
    gemm.scaled_count = gemm.contraction_count;
    gemm.column_scale = factors.const_data_ptr<float>();
    if (need_z) gemm.sum_out = z.mutable_data_ptr();
    if (split) add(gemm, times_transposed({rest.const_data_ptr(), rows.columns, rows.matrix.dtype}, base));
    if (wide_bias.defined()) gemm.bias = wide_bias.const_data_ptr<float>();
    run(op, gemm);
    return {y, h, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dora_linear_backward(Tensor grad_y, Tensor x, Tensor h, Tensor z,
                                                                const Tensors& w, const Integers& wf, Tensor lora_a,
                                                                Tensor lora_b, Tensor scale, double scaling,
                                                                double dropout_p, OptionalTensor seed, bool drop_base,
                                                                bool need_x, bool need_a, bool need_b,
                                                                bool need_scale) {
    const char* op = "dora_linear_backward";
    const Rows dy = rows_of(op, "grad_y", grad_y), rows = rows_of(op, "x", x), low_rank = rows_of(op, "h", h);
    const Rows sums = rows_of(op, "z", z);
    const Weight base = Weight::of(op, w, wf);
    check_features(op, "grad_y", grad_y, base.out_features);
    check_features(op, "x", x, base.in_features);
    const Adapter adapter = adapter_of(op, lora_a, lora_b, base.out_features, base.in_features);
    const Tensor factors = column_vector(op, "scale", scale, dy.columns);
    const Dropout dropout = dropout_of(op, dropout_p, seed);
    check_shape(op, "x", x, rows.rows == dy.rows, "[..., in] with grad_y's rows");
    check_shape(op, "h", h, low_rank.rows == dy.rows && low_rank.columns == adapter.rank, "[rows, rank]");
    check_shape(op, "z", z, !need_scale || (sums.rows == dy.rows && sums.columns == dy.columns), "grad_y's");
    const bool split = drop_base && dropout.threshold > 0;
    const auto s = static_cast<float>(scaling);
    const Tensor nothing = torch::stable::new_empty(grad_y, {0});

    const auto* scale_data = factors.const_data_ptr<float>();

    Tensor grad_b = need_b ? grad_b_of(op, dy, low_rank, lora_b, s, scale_data) : torch::stable::new_empty(lora_b, {0});
    Tensor dh = nothing;
    if (need_x || need_a) {
        Tensor scaled_b = wide(lora_b);
        if (lora_b.scalar_type() == ScalarType::Float) scaled_b = torch::stable::clone(scaled_b);
        auto* p = scaled_b.mutable_data_ptr<float>();
        for (int64_t j = 0; j < dy.columns; ++j)
            for (int64_t k = 0; k < adapter.rank; ++k) p[j * adapter.rank + k] *= scale_data[j];
        dh = grad_h_of(op, dy, {adapter.a, rows_of(op, "lora_b", scaled_b), adapter.rank}, s);
    }
    Tensor grad_a = need_a ? grad_a_of(op, dh, rows, lora_a, dropout) : torch::stable::new_empty(lora_a, {0});

    // dz = scale * dy and dscale = sum of dy * z, in one pass. Where the base is dropped as well:
    // dx = mask * (dh A + (scale - 1) dy W) + dy W.
    Tensor scaled = need_x ? empty_with_columns(grad_y, dy.columns) : nothing;
    Tensor grad_scale = torch::stable::new_empty(factors, {need_scale ? dy.columns : 0});
    if (need_x || need_scale)
        scale_columns(
            op,
            {dy.matrix, sums.matrix, scale_data, split ? 1.0f : 0.0f, need_x ? scaled.mutable_data_ptr() : nullptr,
             dy.columns, need_scale ? grad_scale.mutable_data_ptr<float>() : nullptr, dy.rows},
            dy.columns);
    Tensor grad_x = need_x ? torch::stable::new_empty(x, x.sizes(), grad_y.scalar_type()) : nothing;
    if (need_x) {
        Gemm gemm = gemm_into(grad_x, dy.rows, rows.columns);
        add(gemm, times(rows_of(op, "grad_h", dh).matrix, adapter.a.matrix, adapter.rank));
        if (!split) gemm.contractions[0].result_dropout = dropout;
        add(gemm, times(rows_of(op, "grad_z", scaled).matrix, base));
        if (split) {
            gemm.contractions[1].result_dropout = dropout;
            add(gemm, times(dy.matrix, base));
        }
        run(op, gemm);
    }
    return {grad_x, grad_a, grad_b, grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("dora_linear_square_norm", TORCH_BOX(&dora_linear_square_norm));
    m.impl("dora_linear_norm", TORCH_BOX(&dora_linear_norm));
    m.impl("dora_linear_norm_backward", TORCH_BOX(&dora_linear_norm_backward));
    m.impl("dora_linear", TORCH_BOX(&dora_linear));
    m.impl("dora_linear_backward", TORCH_BOX(&dora_linear_backward));
}

}  // namespace peftkern
