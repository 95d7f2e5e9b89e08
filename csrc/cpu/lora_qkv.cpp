// lora_qkv on the CPU: the low-rank products of all projections side by side, the gradients of x in one sum. Formula
// and reference: peftkern/ops/lora_qkv.py.
#include "cpu/lora_qkv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/check.h"

namespace peftkern {
namespace {

// Stacking copies A but packs x once for all projections: even at 32 rows, a tenth of these products from 64 on.
constexpr int64_t kStackedRows = 32;

void check_count(const char* op, const char* name, size_t count, size_t wanted) {
    PEFTKERN_CHECK(count == wanted, op, ": ", name, " must have ", wanted, " entries, got ", count);
}

// Rows or columns `begin` to `begin + count`.
Tensor part_of(Tensor matrix, int64_t dim, int64_t begin, int64_t count) {
    return torch::stable::narrow(matrix, dim, begin, count);
}

bool same_dtype(const Projections& projections) {
    return std::all_of(projections.begin(), projections.end(), [&](const Projection& p) {
        return p.adapter.a.matrix.dtype == projections[0].adapter.a.matrix.dtype;
    });
}

bool any_dropout(const Projections& projections) {
    return std::any_of(projections.begin(), projections.end(),
                       [](const Projection& p) { return p.dropout.threshold != 0; });
}

// A's below each other, of one dtype.
Rows stacked(const Projections& projections) {
    const Rows& first = projections[0].adapter.a;
    Tensor all = torch::stable::new_empty(first.tensor, {total_rank(projections), first.columns});
    auto* to = static_cast<uint8_t*>(all.mutable_data_ptr());
    const int64_t bytes = first.columns * all.element_size();
    for (const Projection& p : projections) {
        const auto* from = static_cast<const uint8_t*>(p.adapter.a.matrix.data);
        for (int64_t row = 0; row < p.adapter.rank; ++row, to += bytes)
            std::memcpy(to, from + row * p.adapter.a.matrix.stride * all.element_size(), static_cast<size_t>(bytes));
    }
    return rows_of("stacked", "lora_a", all);
}

// out [m, n] = the sum of all terms, rounded once: what one Gemm cannot take goes before it, into fp32.
void run_sum(const char* op, const std::vector<Contraction>& terms, const Tensor& out, int64_t m, int64_t n) {
    Tensor partial;
    for (size_t begin = 0; begin < terms.size(); begin += kMaxContractions) {
        const size_t end = std::min(begin + kMaxContractions, terms.size());
        Tensor target = end == terms.size() ? out : empty_fp32(out, m, n);
        Gemm gemm = gemm_into(target, m, n);
        for (size_t i = begin; i < end; ++i) add(gemm, terms[i]);
        if (partial.defined()) gemm.residual = rows_of(op, "partial sum", partial).matrix;
        run(op, gemm);
        partial = target;
    }
}

}  // namespace

Projections projections_of(const char* op, const ProjectionLists& lists) {
    const std::vector<WeightParts> weights = weights_of(op, lists.w, lists.wf);
    const size_t count = weights.size();
    PEFTKERN_CHECK(count > 0, op, ": w must have at least one weight");
    check_count(op, "lora_as", lists.lora_as.size(), count);
    check_count(op, "lora_bs", lists.lora_bs.size(), count);
    check_count(op, "scalings", lists.scalings.size(), count);
    if (lists.seeds.has_value()) check_count(op, "seeds", static_cast<size_t>(lists.seeds->numel()), count);

    Projections projections;
    int64_t rank = 0;
    for (size_t i = 0; i < count; ++i) {
        Weight base = Weight::of(op, weights[i]);
        Adapter adapter = adapter_of(op, lists.lora_as[i], lists.lora_bs[i], base.out_features, base.in_features);
        OptionalTensor seed;
        if (lists.seeds.has_value() && adapter.rank)
            seed = part_of(torch::stable::flatten(*lists.seeds), 0, static_cast<int64_t>(i), 1);
        const Dropout dropout = dropout_of(op, lists.dropout_p, seed);
        projections.push_back({base, adapter, static_cast<float>(lists.scalings[i]), dropout, rank});
        rank += adapter.rank;
    }
    return projections;
}

int64_t total_rank(const Projections& projections) {
    int64_t rank = 0;
    for (const Projection& p : projections) rank += p.adapter.rank;
    return rank;
}

Tensor columns_of(const Tensor& h, const Projection& projection) {
    return part_of(h, 1, projection.first_rank, projection.adapter.rank);
}

Tensor project(const char* op, const Rows& x, const Tensor& h, const Projection& projection, const Tensor& bias) {
    const Rows columns = rows_of(op, "h", columns_of(h, projection));
    const OptionalTensor given = bias.numel() ? OptionalTensor(bias) : std::nullopt;
    return adapted_product(op, x, columns, projection.base, projection.adapter, projection.scaling,
                           bias_of(op, given, projection.base.out_features));
}

std::vector<LowRank> low_rank_of(const Projections& projections, int64_t rows) {
    if (rows >= kStackedRows && projections.size() > 1 && same_dtype(projections) && !any_dropout(projections))
        return {{stacked(projections), projections[0].first_rank, projections[0].dropout}};
    std::vector<LowRank> each;
    for (const Projection& p : projections)
        if (p.adapter.rank) each.push_back({p.adapter.a, p.first_rank, p.dropout});
    return each;
}

void down_projections(const char* op, const Rows& x, const std::vector<LowRank>& low_rank, const Tensor& h) {
    for (const LowRank& part : low_rank)
        down_projection_into(op, x, part.a, part.dropout, part_of(h, 1, part.first_rank, part.a.rows));
}

void grad_h_into(const char* op, const std::vector<Rows>& dys, const Projections& projections, const Tensor& grad_h) {
    for (size_t i = 0; i < projections.size(); ++i)
        grad_h_into(op, dys[i], projections[i].adapter, projections[i].scaling, columns_of(grad_h, projections[i]));
}

void grad_x_into(const char* op, const std::vector<Rows>& dys, const Tensor& grad_h, const Projections& projections,
                 const std::vector<LowRank>& low_rank, const Tensor& grad_x) {
    std::vector<Contraction> terms;
    for (const LowRank& part : low_rank) {
        const Tensor columns = part_of(grad_h, 1, part.first_rank, part.a.rows);
        terms.push_back(times(rows_of(op, "grad_h", columns).matrix, part.a.matrix, part.a.rows));
        (terms.size() == 1 ? terms[0].result_dropout : terms.back().term_dropout) = part.dropout;
    }
    for (size_t i = 0; i < projections.size(); ++i) terms.push_back(times(dys[i].matrix, projections[i].base));
    run_sum(op, terms, grad_x, dys[0].rows, projections[0].base.in_features);
}

Tensor grad_a_of(const char* op, const Tensor& grad_h, const Rows& x, const Projections& projections) {
    const Rows& first = projections[0].adapter.a;
    const int64_t rank = total_rank(projections), begin = projections[0].first_rank;
    Tensor grad_a = same_dtype(projections) ? torch::stable::new_empty(first.tensor, {rank, x.columns})
                                            : empty_fp32(x.tensor, rank, x.columns);
    if (!any_dropout(projections)) {
        const Tensor columns = part_of(grad_h, 1, begin, rank);
        grad_a_into(op, rows_of(op, "grad_h", columns), x, projections[0].dropout, grad_a);
        return grad_a;
    }
    for (const Projection& p : projections)
        grad_a_into(op, rows_of(op, "grad_h", columns_of(grad_h, p)), x, p.dropout,
                    part_of(grad_a, 0, p.first_rank - begin, p.adapter.rank));
    return grad_a;
}

Tensors grad_b_of(const char* op, const std::vector<Rows>& dys, const Tensor& h, const Projections& projections) {
    Tensors grads;
    for (size_t i = 0; i < projections.size(); ++i) {
        const Projection& p = projections[i];
        grads.push_back(grad_b_of(op, dys[i], rows_of(op, "h", columns_of(h, p)), p.adapter.b.tensor, p.scaling));
    }
    return grads;
}

namespace {

std::tuple<Tensors, Tensor> lora_qkv(const Tensor& x, const Tensors& w, const Integers& wf, const Tensors& lora_as,
                                     const Tensors& lora_bs, const Numbers& scalings, const Tensors& biases,
                                     double dropout_p, const OptionalTensor& seeds) {
    const char* op = "lora_qkv";
    const Rows rows = rows_of(op, "x", x);
    const Projections projections = projections_of(op, {w, wf, lora_as, lora_bs, scalings, dropout_p, seeds});
    for (const Projection& p : projections) check_features(op, "x", x, p.base.in_features);
    check_count(op, "biases", biases.size(), projections.size());
    const Tensor h = empty_fp32(x, rows.rows, total_rank(projections));
    down_projections(op, rows, low_rank_of(projections, rows.rows), h);
    Tensors ys;
    for (size_t i = 0; i < projections.size(); ++i) ys.push_back(project(op, rows, h, projections[i], biases[i]));
    return {ys, h};
}

std::tuple<Tensor, Tensor, Tensors> lora_qkv_backward(const Tensors& grad_ys, const Tensor& x, const Tensor& h,
                                                      const Tensors& w, const Integers& wf, const Tensors& lora_as,
                                                      const Tensors& lora_bs, const Numbers& scalings, double dropout_p,
                                                      const OptionalTensor& seeds, bool need_x, bool need_a,
                                                      bool need_b) {
    const char* op = "lora_qkv_backward";
    const Rows rows = rows_of(op, "x", x);
    const Projections projections = projections_of(op, {w, wf, lora_as, lora_bs, scalings, dropout_p, seeds});
    check_count(op, "grad_ys", grad_ys.size(), projections.size());
    std::vector<Rows> dys;
    for (size_t i = 0; i < projections.size(); ++i) {
        check_features(op, "x", x, projections[i].base.in_features);
        dys.push_back(rows_of(op, "grad_ys", grad_ys[i]));
        check_features(op, "grad_ys", grad_ys[i], projections[i].base.out_features);
        check_shape(op, "grad_ys", grad_ys[i], dys[i].rows == rows.rows, "[..., out] with x's rows");
    }
    const int64_t rank = total_rank(projections);
    check_shape(op, "h", h, h.dim() == 2 && h.size(0) == rows.rows && h.size(1) == rank, "[rows, ranks]");

    const auto nothing = [&] { return torch::stable::new_empty(x, {0}); };
    Tensor grad_h = nothing(), grad_x = nothing(), grad_a = nothing();
    if (need_x || need_a) {
        grad_h = empty_fp32(x, rows.rows, rank);
        grad_h_into(op, dys, projections, grad_h);
    }
    if (need_x) {
        grad_x = torch::stable::new_empty(x, x.sizes(), grad_ys[0].scalar_type());
        grad_x_into(op, dys, grad_h, projections, low_rank_of(projections, rows.rows), grad_x);
    }
    if (need_a) grad_a = grad_a_of(op, grad_h, rows, projections);
    return {grad_x, grad_a, need_b ? grad_b_of(op, dys, h, projections) : Tensors()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("lora_qkv", TORCH_BOX(&lora_qkv));
    m.impl("lora_qkv_backward", TORCH_BOX(&lora_qkv_backward));
}

}  // namespace peftkern
