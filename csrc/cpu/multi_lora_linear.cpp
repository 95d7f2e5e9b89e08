// multi_lora_linear on the CPU: the rows of one adapter are brought together, then every product of the low-rank path
// is one pass over all adapters, and the base product is lora_linear's. Formula and reference:
// peftkern/ops/multi_lora_linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/lora_linear.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;
using Numbers = std::vector<double>;

// Elements copied by one thread: less is not worth another.
constexpr int64_t kGrainElements = 1 << 15;

// One adapter and the rows that are its own, once they are in order.
struct Group {
    Adapter adapter;
    float scaling;
    int64_t begin, end;
    Dropout dropout;  // of these rows

    int64_t rows() const { return end - begin; }
};

// The rows by adapter, in their own order within each; those of none come last.
struct Batch {
    std::vector<Group> groups;
    Integers order;   // where each of them is in x
    bool in_order;    // it is where it was
    int64_t width;    // of h: the largest rank
    Dropout dropout;  // of all rows in this order; points into `order`

    Batch() = default;
    Batch(const Batch&) = delete;
};

void check_count(const char* op, const char* name, size_t count, size_t wanted) {
    PEFTKERN_CHECK(count == wanted, op, ": ", name, " must have ", wanted, " entries, got ", count);
}

// Sorts the rows by counting; an index stands for as many rows as come to each.
void sort_rows(const char* op, const Tensor& indices, int64_t rows, Batch& batch) {
    const auto adapters = static_cast<int64_t>(batch.groups.size());
    const int64_t count = indices.numel();
    check_dtype(op, "indices", indices, indices.scalar_type() == ScalarType::Long, "Long");
    check_shape(op, "indices", indices, count ? rows % count == 0 : rows == 0, "x's leading shape");
    const Tensor dense = torch::stable::contiguous(indices);
    const auto* index = dense.const_data_ptr<int64_t>();
    const int64_t repeats = count ? rows / count : 0;

    Integers next(static_cast<size_t>(adapters + 1), 0);  // by adapter, none last
    const auto place = [&](int64_t i) -> int64_t& {
        return next[static_cast<size_t>(index[i] < 0 ? adapters : index[i])];
    };
    for (int64_t i = 0; i < count; ++i) {
        PEFTKERN_CHECK(index[i] >= -1 && index[i] < adapters, op, ": indices must be from -1 to ", adapters - 1,
                       ", got ", index[i]);
        place(i) += repeats;
    }
    int64_t begin = 0;
    for (size_t i = 0; i < next.size(); ++i) {
        const int64_t own = next[i];
        if (i < batch.groups.size()) {
            batch.groups[i].begin = begin;
            batch.groups[i].end = begin + own;
        }
        next[i] = begin;
        begin += own;
    }
    batch.order.resize(static_cast<size_t>(rows));
    for (int64_t i = 0; i < count; ++i)
        for (int64_t row = i * repeats; row < (i + 1) * repeats; ++row)
            batch.order[static_cast<size_t>(place(i)++)] = row;
    batch.in_order = std::is_sorted(batch.order.begin(), batch.order.end());
}

void read_batch(const char* op, const Tensors& lora_as, const Tensors& lora_bs, const Numbers& scalings,
                const Tensor& indices, int64_t rows, int64_t out_features, int64_t in_features, const Dropout& dropout,
                Batch& batch) {
    check_count(op, "lora_bs", lora_bs.size(), lora_as.size());
    check_count(op, "scalings", scalings.size(), lora_as.size());
    batch.width = 0;
    for (size_t i = 0; i < lora_as.size(); ++i) {
        Adapter adapter = adapter_of(op, lora_as[i], lora_bs[i], out_features, in_features);
        batch.width = std::max(batch.width, adapter.rank);
        batch.groups.push_back({adapter, static_cast<float>(scalings[i]), 0, 0, dropout});
    }
    sort_rows(op, indices, rows, batch);
    batch.dropout = dropout;
    batch.dropout.rows = batch.order.data();
    for (Group& group : batch.groups) group.dropout.rows = batch.order.data() + group.begin;
}

// to[i] = from[order[i]], or to[order[i]] = from[i], whole rows.
void copy_rows(const Batch& batch, const Rows& from, Tensor& to, bool back) {
    const int64_t size = to.element_size(), bytes = from.columns * size, pitch = from.matrix.stride * size;
    const auto* source = static_cast<const uint8_t*>(from.matrix.data);
    auto* target = static_cast<uint8_t*>(to.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, from.columns));
    torch::stable::parallel_for(0, from.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = batch.order[static_cast<size_t>(i)];
            std::memcpy(target + (back ? row : i) * bytes, source + (back ? i : row) * pitch,
                        static_cast<size_t>(bytes));
        }
    });
}

// The rows in the batch's order; themselves where that is their own.
Rows in_order(const char* op, const char* name, const Batch& batch, const Rows& rows) {
    if (batch.in_order) return rows;
    Tensor sorted = torch::stable::new_empty(rows.tensor, {rows.rows, rows.columns});
    copy_rows(batch, rows, sorted, false);
    return rows_of(op, name, sorted);
}

// Runs a gemm whose rows are in the batch's order, and writes its result, of `like`'s dtype, in x's.
void run_back(const char* op, const Batch& batch, Gemm gemm, Tensor& out) {
    if (batch.in_order) return run(op, gemm);
    Tensor sorted = torch::stable::new_empty(out, {gemm.m, gemm.n});
    gemm.out = sorted.mutable_data_ptr();
    run(op, gemm);
    copy_rows(batch, rows_of(op, "result", sorted), out, true);
}

// A group's rows, and its part of h [rows, width].
Rows rows_of_group(const Rows& rows, const Group& group) {
    Rows own = rows;
    const int64_t bytes = group.begin * rows.matrix.stride * rows.tensor.element_size();
    own.matrix.data = static_cast<const uint8_t*>(rows.matrix.data) + bytes;
    own.rows = group.rows();
    return own;
}
Tensor block_of(const Tensor& h, const Group& group) {
    Tensor rows = torch::stable::narrow(const_cast<Tensor&>(h), 0, group.begin, group.rows());
    return torch::stable::narrow(rows, 1, 0, group.adapter.rank);
}

// [rows, width], zero where a row's adapter is of smaller rank or missing.
Tensor low_rank_zeros(const Tensor& like, int64_t rows, const Batch& batch) {
    Tensor h = empty_fp32(like, rows, batch.width);
    std::memset(h.mutable_data_ptr(), 0, static_cast<size_t>(rows * batch.width) * sizeof(float));
    return h;
}

// h times each group's B^T, scaled; or dh times each group's A.
std::vector<Segment> segments_of(const Batch& batch, bool up) {
    std::vector<Segment> segments;
    for (const Group& group : batch.groups) {
        const Matrix& weight = up ? group.adapter.b.matrix : group.adapter.a.matrix;
        if (group.rows())
            segments.push_back({group.begin, group.end, group.adapter.rank, weight, up ? group.scaling : 1});
    }
    return segments;
}
Contraction by_segment(Contraction c, const std::vector<Segment>& segments) {
    c.segments = segments.data();
    c.segment_count = static_cast<int64_t>(segments.size());
    return c;
}

std::tuple<Tensor, Tensor> multi_lora_linear(const Tensor& x, const Tensors& w, const Integers& wf,
                                             const Tensors& lora_as, const Tensors& lora_bs, const Numbers& scalings,
                                             const Tensor& indices, const OptionalTensor& bias, double dropout_p,
                                             const OptionalTensor& seed) {
    const char* op = "multi_lora_linear";
    const Rows rows = rows_of(op, "x", x);
    const Weight base = Weight::of(op, w, wf);
    check_features(op, "x", x, base.in_features);
    const int64_t out_features = base.out_features;
    const Tensor wide_bias = bias_of(op, bias, out_features);
    Batch batch;
    read_batch(op, lora_as, lora_bs, scalings, indices, rows.rows, out_features, rows.columns,
               dropout_of(op, dropout_p, seed), batch);

    const Rows sorted = in_order(op, "x", batch, rows);
    const Tensor h = low_rank_zeros(x, rows.rows, batch);
    std::vector<Gemm> products;
    for (const Group& group : batch.groups)
        products.push_back(
            down_projection_product(rows_of_group(sorted, group), group.adapter.a, group.dropout, block_of(h, group)));
    run(op, products);

    Tensor y = empty_with_columns(x, out_features);
    Gemm gemm = gemm_into(y, rows.rows, out_features);
    const std::vector<Segment> segments = segments_of(batch, true);
    if (!segments.empty())
        add(gemm, by_segment(times_transposed(rows_of(op, "h", h).matrix, Matrix{}, batch.width), segments));
    add(gemm, times_transposed(sorted.matrix, base));
    if (wide_bias.defined()) gemm.bias = wide_bias.const_data_ptr<float>();
    run_back(op, batch, gemm, y);
    return {y, h};
}

std::tuple<Tensor, Tensors, Tensors> multi_lora_linear_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& h, const Tensors& w, const Integers& wf,
    const Tensors& lora_as, const Tensors& lora_bs, const Numbers& scalings, const Tensor& indices, double dropout_p,
    const OptionalTensor& seed, bool need_x, const Integers& need_as, const Integers& need_bs) {
    const char* op = "multi_lora_linear_backward";
    const Rows given_dy = rows_of(op, "grad_y", grad_y), given_x = rows_of(op, "x", x);
    const int64_t rows = given_dy.rows, out_features = given_dy.columns, in_features = given_x.columns;
    const Weight base = Weight::of(op, w, wf);
    check_features(op, "grad_y", grad_y, base.out_features);
    check_features(op, "x", x, base.in_features);
    check_shape(op, "x", x, given_x.rows == rows, "[..., in] with grad_y's rows");
    Batch batch;
    read_batch(op, lora_as, lora_bs, scalings, indices, rows, out_features, in_features,
               dropout_of(op, dropout_p, seed), batch);
    check_shape(op, "h", h, h.dim() == 2 && h.size(0) == rows && h.size(1) == batch.width, "[rows, largest rank]");
    check_count(op, "need_as", need_as.size(), lora_as.size());
    check_count(op, "need_bs", need_bs.size(), lora_bs.size());
    const auto any = [](const Integers& needs) { return std::find(needs.begin(), needs.end(), 1) != needs.end(); };
    const auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };

    const Rows dy = in_order(op, "grad_y", batch, given_dy);
    const Rows sorted_x = any(need_as) ? in_order(op, "x", batch, given_x) : given_x;
    Tensor grad_h = none(x), grad_x = none(grad_y);
    std::vector<Gemm> products;
    if (need_x || any(need_as)) {
        grad_h = low_rank_zeros(x, rows, batch);
        for (size_t i = 0; i < batch.groups.size(); ++i) {
            const Group& group = batch.groups[i];
            if (need_x || need_as[i])
                products.push_back(
                    grad_h_product(rows_of_group(dy, group), group.adapter.b, group.scaling, block_of(grad_h, group)));
        }
        run(op, products);
    }
    if (need_x) {
        grad_x = torch::stable::new_empty(x, x.sizes(), grad_y.scalar_type());
        Gemm gemm = gemm_into(grad_x, rows, in_features);
        const std::vector<Segment> segments = segments_of(batch, false);
        if (!segments.empty()) {
            add(gemm, by_segment(times(rows_of(op, "grad_h", grad_h).matrix, Matrix{}, batch.width), segments));
            gemm.contractions[0].result_dropout = batch.dropout;
        }
        add(gemm, times(dy.matrix, base));
        run_back(op, batch, gemm, grad_x);
    }
    Tensors grad_as, grad_bs;
    products.clear();
    for (size_t i = 0; i < batch.groups.size(); ++i) {
        const Group& group = batch.groups[i];
        grad_as.push_back(need_as[i] ? torch::stable::new_empty(lora_as[i], lora_as[i].sizes()) : none(lora_as[i]));
        grad_bs.push_back(need_bs[i] ? torch::stable::new_empty(lora_bs[i], lora_bs[i].sizes()) : none(lora_bs[i]));
        if (need_as[i])
            products.push_back(grad_a_product(rows_of(op, "grad_h", block_of(grad_h, group)),
                                              rows_of_group(sorted_x, group), group.dropout, grad_as.back()));
        if (need_bs[i])
            products.push_back(grad_b_product(rows_of_group(dy, group), rows_of(op, "h", block_of(h, group)),
                                              group.scaling, nullptr, grad_bs.back()));
    }
    run(op, products);
    return {grad_x, grad_as, grad_bs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("multi_lora_linear", TORCH_BOX(&multi_lora_linear));
    m.impl("multi_lora_linear_backward", TORCH_BOX(&multi_lora_linear_backward));
}

}  // namespace peftkern
