// prefix_attention on the CPU: attention over prefix, which may be empty, and tokens by kernels of our own, which skip
// what is hidden.
// Formula and reference: peftkern/ops/prefix_attention.py.
#include "cpu/prefix_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/engine.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;

const PrefixKernels* const kLevels[kIsaCount] = {&peftkern_prefix_scalar, &peftkern_prefix_avx2,
                                                 &peftkern_prefix_avx512, &peftkern_prefix_avx512bf16};
// Fewer products or elements are not worth another thread.
constexpr int64_t kGrainProducts = 1 << 20;
constexpr int64_t kGrainElements = 1 << 15;
// No score makes up for such a mask.
constexpr float kHidden = -1e30f;

Dtype dtype_of(const Tensor& t) {
    if (t.scalar_type() == ScalarType::BFloat16) return Dtype::kBFloat16;
    return t.scalar_type() == ScalarType::Half ? Dtype::kFloat16 : Dtype::kFloat32;
}

// The last dimension dense, as the kernels read it.
Tensor dense(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

Tensor checked(const char* op, const char* name, const Tensor& t, int64_t dim, const std::string& shape) {
    const ScalarType type = t.scalar_type();
    const bool floating = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
    check_dtype(op, name, t, floating, "fp32, bf16 or fp16");
    check_shape(op, name, t, t.dim() == dim, shape);
    return dense(t);
}

bool same_sizes(const Tensor& a, const Tensor& b) {
    return std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin(), b.sizes().end());
}

// [batch, heads, rows, columns] laid out as [batch, rows, heads, columns], like torch's flash attention.
Tensor empty_heads(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
    return torch::stable::transpose(torch::stable::new_empty(like, {batch, rows, heads, columns}), 1, 2);
}

// [.., heads, rows, ...]; without a batch all its elements share it.
Heads heads_of(const Tensor& t) {
    const int64_t first = t.dim() == 3 ? 0 : 1;
    return {t.data_ptr(), first ? t.stride(0) : 0, t.stride(first), t.stride(first + 1), dtype_of(t)};
}

// How many leading tokens a row of a mask lets take part: up to the last that is not hidden.
template <class IsHidden>
int32_t seen_tokens(int64_t keys, IsHidden is_hidden) {
    while (keys > 0 && is_hidden(keys - 1)) --keys;
    return static_cast<int32_t>(keys);
}

// The arguments of both passes.
struct Arguments {
    Tensor query, key, value, prefix_key, prefix_value, mask;
    int64_t batch, heads, kv_heads, queries, keys, head_dim, prefix_length;
    bool is_causal;
    double scale;

    Arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pk, const Tensor& pv,
              const OptionalTensor& attn_mask, bool causal, double scale_)
        : query(checked(op, "query", q, 4, "[batch, heads, queries, head_dim]")),
          key(checked(op, "key", k, 4, "[batch, kv_heads, keys, head_dim]")),
          value(checked(op, "value", v, 4, "[batch, kv_heads, keys, head_dim]")),
          prefix_key(checked(op, "prefix_key", pk, pk.dim() == 4 ? 4 : 3, "[kv_heads, length, head_dim]")),
          prefix_value(checked(op, "prefix_value", pv, pk.dim() == 4 ? 4 : 3, "[kv_heads, length, head_dim]")),
          batch(q.size(0)),
          heads(q.size(1)),
          kv_heads(k.size(1)),
          queries(q.size(2)),
          keys(k.size(2)),
          head_dim(q.size(3)),
          prefix_length(pk.size(pk.dim() - 2)),
          is_causal(causal),
          scale(scale_) {
        const auto sizes = [](const Tensor& t) { return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()); };
        const std::vector<int64_t> tokens = {batch, kv_heads, keys, head_dim};
        std::vector<int64_t> prefix = {kv_heads, prefix_length, head_dim};
        if (pk.dim() == 4) prefix.insert(prefix.begin(), batch);
        check_shape(op, "key", key, sizes(key) == tokens, "[batch, kv_heads, keys, head_dim] with query's sizes");
        check_shape(op, "value", value, sizes(value) == tokens, "of key");
        check_shape(op, "prefix_key", pk, sizes(pk) == prefix, "[kv_heads, length, head_dim] with key's sizes");
        check_shape(op, "prefix_value", pv, sizes(pv) == prefix, "of prefix_key");
        check_shape(op, "query", query, kv_heads > 0 && heads % kv_heads == 0, "with a multiple of key's heads");
        check_shape(op, "query", query, head_dim > 0, "[batch, heads, queries, head_dim]");
        for (const Tensor* t : {&key, &value})
            check_dtype(op, "key and value", *t, t->scalar_type() == query.scalar_type(), "of query's dtype");
        if (attn_mask.has_value()) {
            mask = checked(op, "attn_mask", *attn_mask, 4, "[batch, heads, queries, keys]");
            const bool right = sizes(mask) == std::vector<int64_t>{batch, heads, queries, keys};
            check_shape(op, "attn_mask", mask, right, "[batch, heads, queries, keys]");
        }
    }

    bool nothing() const { return batch == 0 || heads == 0 || queries == 0; }

    // What `memory` is filled with: one number for what a mask repeats.
    VisibleKeys visible(std::vector<int32_t>& memory) const {
        const auto length = static_cast<int32_t>(prefix_length), total = static_cast<int32_t>(length + keys);
        if (!mask.defined()) {
            for (int64_t i = 0; i < (is_causal ? queries : 1); ++i)
                memory.push_back(is_causal ? std::min(static_cast<int32_t>(length + i + 1), total) : total);
            return {memory.data(), 0, 0, is_causal};
        }
        const auto different = [&](int64_t dim) { return mask.stride(dim) == 0 ? 1 : mask.size(dim); };
        const int64_t sizes[3] = {different(0), different(1), different(2)};
        memory.resize(static_cast<size_t>(sizes[0] * sizes[1] * sizes[2]));
        const Dtype dtype = dtype_of(mask);
        const int64_t grain = std::max<int64_t>(1, kGrainProducts / (sizes[2] * std::max<int64_t>(1, keys)));
        torch::stable::parallel_for(0, sizes[0] * sizes[1], grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * sizes[2]; i < end * sizes[2]; ++i) {
                const int64_t outer = i / sizes[2], row = outer / sizes[1] * mask.stride(0) +
                                                          outer % sizes[1] * mask.stride(1) +
                                                          i % sizes[2] * mask.stride(2);
                int32_t seen = static_cast<int32_t>(keys);
                if (dtype == Dtype::kFloat32) {
                    const float* p = static_cast<const float*>(mask.const_data_ptr()) + row;
                    seen = seen_tokens(keys, [&](int64_t j) { return p[j] <= kHidden; });
                } else if (dtype == Dtype::kBFloat16) {
                    // From -1e30 to -infinity, behind which is NaN.
                    const auto* p = static_cast<const uint16_t*>(mask.const_data_ptr()) + row;
                    seen = seen_tokens(keys, [&](int64_t j) { return p[j] >= 0xf149 && p[j] <= 0xff80; });
                }
                memory[static_cast<size_t>(i)] = length + seen;
            }
        });
        return {memory.data(), sizes[0] > 1 ? sizes[1] * sizes[2] : 0, sizes[1] > 1 ? sizes[2] : 0, sizes[2] > 1};
    }

    PrefixAttention pass() const {
        PrefixAttention pass = {};
        pass.batch = batch;
        pass.kv_heads = kv_heads;
        pass.group = heads / kv_heads;
        pass.queries = queries;
        pass.keys = keys;
        pass.head_dim = head_dim;
        pass.prefix_length = prefix_length;
        // Without a prefix there is nothing that the elements of a batch share.
        pass.per_batch = prefix_key.dim() == 4 || prefix_length == 0;
        pass.scale = static_cast<float>(scale);
        pass.chunks = pass.per_batch ? 1 : std::min(kPrefixChunks, batch);
        pass.prefix_key = heads_of(prefix_key);
        pass.prefix_value = heads_of(prefix_value);
        pass.query = heads_of(query);
        pass.key = heads_of(key);
        pass.value = heads_of(value);
        if (mask.defined()) pass.mask = heads_of(mask);
        return pass;
    }
};

void run(const char* op, const PrefixAttention& pass, int64_t items,
         void (*PrefixKernels::*kernel)(const PrefixAttention*, int64_t, void*),
         size_t (*PrefixKernels::*bytes_of)(const PrefixAttention*)) {
    const PrefixKernels& kernels = *kLevels[static_cast<int>(level_for(op, items))];
    const size_t bytes = (kernels.*bytes_of)(&pass);
    const int64_t products = pass.batch * pass.kv_heads * prefix_rows(pass) * (pass.prefix_length + pass.keys) *
                             pass.head_dim / std::max<int64_t>(1, items);
    const int64_t grain = std::max<int64_t>(1, kGrainProducts / std::max<int64_t>(1, products));
    std::atomic<bool> no_memory{false};
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
        constexpr std::align_val_t kAlignment{64};
        const auto free = [](void* p) { ::operator delete(p, kAlignment); };
        const std::unique_ptr<void, decltype(free)> memory(::operator new(bytes, kAlignment, std::nothrow), free);
        // What parallel_for makes of an exception does not say how much memory.
        if (!memory) no_memory = true;
        for (int64_t i = begin; memory && i < end; ++i) (kernels.*kernel)(&pass, i, memory.get());
    });
    PEFTKERN_CHECK(!no_memory, op, ": no memory for a workspace of ", bytes, " bytes");
}

// Adds up the chunks of grad_prefix, `part` 0 for keys and 1 for values, and rounds.
Tensor grad_prefix_of(const PrefixAttention& pass, const Tensor& parts, int64_t part, const Tensor& like) {
    const int64_t columns = prefix_padded(pass.head_dim), size = pass.prefix_length * columns;
    const float* from = parts.const_data_ptr<float>();
    const float factor = part == 0 ? pass.scale : 1.0f;
    Tensor sum = torch::stable::new_zeros(like, like.sizes(), ScalarType::Float);
    if (size == 0) return torch::stable::to(sum, like.scalar_type());
    float* sums = sum.mutable_data_ptr<float>();
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (pass.chunks * size));
    torch::stable::parallel_for(0, prefix_count(pass), grain, [&](int64_t first, int64_t end) {
        for (int64_t prefix = first; prefix < end; ++prefix)
            for (int64_t chunk = 0; chunk < pass.chunks; ++chunk)
                for (int64_t j = 0; j < pass.prefix_length; ++j) {
                    const float* row = from + ((prefix * pass.chunks + chunk) * 2 + part) * size + j * columns;
                    float* __restrict to = sums + (prefix * pass.prefix_length + j) * pass.head_dim;
                    for (int64_t c = 0; c < pass.head_dim; ++c) to[c] += factor * row[c];
                }
    });
    return torch::stable::to(sum, like.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> prefix_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key,
                                            Tensor prefix_value, OptionalTensor attn_mask, bool is_causal,
                                            double scale) {
    const char* op = "prefix_attention";
    const Arguments a(op, query, key, value, prefix_key, prefix_value, attn_mask, is_causal, scale);
    Tensor out = empty_heads(query, a.batch, a.heads, a.queries, a.head_dim);
    Tensor lse = torch::stable::new_empty(query, {a.batch, a.heads, a.queries}, ScalarType::Float);
    if (a.nothing()) return {out, lse};
    PrefixAttention pass = a.pass();
    std::vector<int32_t> visible;
    pass.visible = a.visible(visible);
    pass.out = heads_of(out);
    pass.lse = {lse.data_ptr(), lse.stride(0), lse.stride(1), lse.stride(2), Dtype::kFloat32};
    run(op, pass, a.batch * a.kv_heads * prefix_spans(pass), &PrefixKernels::forward, &PrefixKernels::forward_bytes);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(Tensor grad_out, Tensor query, Tensor key,
                                                                             Tensor value, Tensor prefix_key,
                                                                             Tensor prefix_value,
                                                                             OptionalTensor attn_mask, Tensor out,
                                                                             Tensor lse, bool is_causal, double scale,
                                                                             bool need_tokens, bool need_prefix) {
    const char* op = "prefix_attention_backward";
    const Arguments a(op, query, key, value, prefix_key, prefix_value, attn_mask, is_causal, scale);
    const Tensor dy = checked(op, "grad_out", grad_out, 4, "of query"), y = checked(op, "out", out, 4, "of query");
    for (const Tensor* t : {&dy, &y})
        check_dtype(op, "grad_out and out", *t, t->scalar_type() == a.query.scalar_type(), "of query's dtype");
    check_shape(op, "grad_out", dy, same_sizes(dy, a.query), "of query");
    check_shape(op, "out", y, same_sizes(y, a.query), "of query");
    check_dtype(op, "lse", lse, lse.scalar_type() == ScalarType::Float, "fp32");
    const bool per_query =
        lse.dim() == 3 && lse.size(0) == a.batch && lse.size(1) == a.heads && lse.size(2) == a.queries;
    check_shape(op, "lse", lse, per_query, "[batch, heads, queries]");
    PrefixAttention pass = a.pass();

    const auto grad_tokens = [&](const Tensor& like, int64_t heads, int64_t rows, Heads& of) {
        if (!need_tokens) return torch::stable::new_empty(like, {0});
        Tensor grad = empty_heads(like, a.batch, heads, rows, a.head_dim);
        of = heads_of(grad);
        return a.nothing() ? torch::stable::zero_(grad) : grad;
    };
    const Tensor grad_query = grad_tokens(query, a.heads, a.queries, pass.grad_query);
    const Tensor grad_key = grad_tokens(key, a.kv_heads, a.keys, pass.grad_key);
    const Tensor grad_value = grad_tokens(value, a.kv_heads, a.keys, pass.grad_value);
    Tensor parts = torch::stable::new_empty(query, {0}, ScalarType::Float);
    if (!a.nothing()) {
        const int64_t items = prefix_count(pass) * pass.chunks;
        if (need_prefix) {
            const int64_t size = 2 * a.prefix_length * prefix_padded(a.head_dim);
            parts = torch::stable::new_zeros(query, {items * size}, ScalarType::Float);
            pass.grad_prefix = parts.mutable_data_ptr<float>();
        }
        std::vector<int32_t> visible;
        pass.visible = a.visible(visible);
        if (!need_tokens) {
            // Then only the prefix's scores are needed.
            pass.keys = 0;
            pass.mask = {};
            std::fill(visible.begin(), visible.end(), static_cast<int32_t>(a.prefix_length));
        }
        pass.out = heads_of(y);
        pass.lse = {lse.data_ptr(), lse.stride(0), lse.stride(1), lse.stride(2), Dtype::kFloat32};
        pass.grad_out = heads_of(dy);
        run(op, pass, items, &PrefixKernels::backward, &PrefixKernels::backward_bytes);
    }
    const auto grad_prefix = [&](int64_t part, const Tensor& like) {
        if (!need_prefix) return torch::stable::new_empty(like, {0});
        if (a.nothing()) return torch::stable::new_zeros(like, like.sizes());
        return grad_prefix_of(pass, parts, part, like);
    };
    return {grad_query, grad_key, grad_value, grad_prefix(0, prefix_key), grad_prefix(1, prefix_value)};
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("prefix_attention", TORCH_BOX(&prefix_attention));
    m.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
}

}  // namespace peftkern
