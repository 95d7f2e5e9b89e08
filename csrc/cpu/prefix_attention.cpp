// prefix_attention on the CPU: torch's flash attention over the tokens, our kernels for the prefix and the merge.
// Formula and reference: peftkern/ops/prefix_attention.py.
#include "cpu/prefix_attention.h"

#include <torch/csrc/stable/library.h>

#include <memory>

#include "cpu/prefix_attention_tokens.h"

namespace peftkern {
namespace {

const PrefixKernels* const kLevels[kIsaCount] = {&peftkern_prefix_scalar, &peftkern_prefix_avx2,
                                                 &peftkern_prefix_avx512, &peftkern_prefix_avx512bf16};
// Fewer products are not worth another thread.
constexpr int64_t kGrainProducts = 1 << 18;
constexpr int64_t kGrainElements = 1 << 15;

// [batch, heads, rows, columns] laid out as [batch, rows, heads, columns], like torch's flash attention.
Tensor empty_heads(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
    return torch::stable::transpose(torch::stable::new_empty(like, {batch, rows, heads, columns}), 1, 2);
}

void run(const char* op, const PrefixAttention& pass,
         void (*PrefixKernels::*kernel)(const PrefixAttention*, int64_t, int64_t, float*)) {
    const int64_t items = prefix_count(pass) * pass.chunks;
    const auto function = kLevels[static_cast<int>(level_for(op, items))]->*kernel;
    const int64_t products = std::max<int64_t>(
        1, pass.batch * pass.kv_heads * pass.rows * pass.prefix_length * pass.head_dim / std::max<int64_t>(1, items));
    const auto floats = static_cast<size_t>(prefix_workspace_floats(pass));
    torch::stable::parallel_for(0, items, std::max<int64_t>(1, kGrainProducts / products),
                                [&](int64_t begin, int64_t end) {
                                    const std::unique_ptr<float[]> workspace(new float[floats]);
                                    for (int64_t i = begin; i < end; ++i)
                                        function(&pass, i / pass.chunks, i % pass.chunks, workspace.get());
                                });
}

// The sum of what all parts give their keys or values; each is dense in the layout of empty_heads.
Tensor sum_of(const char* op, const Arguments& a, const std::vector<Tensor>& parts) {
    if (parts.size() == 1 && parts[0].size(2) == a.keys) return parts[0];
    Tensor sum = empty_heads(a.key, a.batch, a.kv_heads, a.keys, a.head_dim);
    std::vector<RowsPart> memory;
    for (const Tensor& part : parts) memory.push_back({part.data_ptr(), part.size(2)});
    const SumParts pass = {memory.data(),  static_cast<int64_t>(memory.size()),
                           a.keys,         a.kv_heads * a.head_dim,
                           sum.data_ptr(), dtype_of(sum)};
    const PrefixKernels& kernels = *kLevels[static_cast<int>(level_for(op, 1))];
    const int64_t grain = std::max<int64_t>(1, kGrainElements / pass.columns);
    torch::stable::parallel_for(0, a.batch * a.keys, grain,
                                [&](int64_t begin, int64_t end) { kernels.sum_parts(&pass, begin, end); });
    return sum;
}

// Adds up the chunks of prefix_backward, `part` 0 for keys and 1 for values, and rounds.
Tensor grad_prefix_of(const Arguments& a, const PrefixAttention& pass, const Tensor& parts, int64_t part,
                      const Tensor& like) {
    const int64_t columns = prefix_padded(a.head_dim), size = a.prefix_length * columns;
    const float* from = parts.const_data_ptr<float>();
    const float factor = part == 0 ? pass.scale : 1.0f;
    Tensor sum = torch::stable::new_zeros(like, like.sizes(), ScalarType::Float);
    float* to = sum.mutable_data_ptr<float>();
    for (int64_t prefix = 0; prefix < prefix_count(pass); ++prefix)
        for (int64_t chunk = 0; chunk < pass.chunks; ++chunk) {
            const float* begin = from + ((prefix * pass.chunks + chunk) * 2 + part) * size;
            for (int64_t j = 0; j < a.prefix_length; ++j)
                for (int64_t c = 0; c < a.head_dim; ++c)
                    to[(prefix * a.prefix_length + j) * a.head_dim + c] += factor * begin[j * columns + c];
        }
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
    for (const Part& part : a.parts()) {
        Tensor tokens, tokens_lse;
        pass.rows = part.rows;
        pass.query = a.heads_of(a.query, part);
        pass.out = a.heads_of(out, part);
        pass.lse = a.heads_of(lse, part);
        pass.tokens = {};
        if (part.keys > 0) {
            std::tie(tokens, tokens_lse) = FlashCall(a, part).forward();
            pass.tokens = heads_of(tokens);
            pass.tokens_lse = heads_of(tokens_lse);
        }
        run(op, pass, &PrefixKernels::forward);
    }
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
    const Tensor dy = checked(op, "grad_out", grad_out, 4, "of out"), y = checked(op, "out", out, 4, "of query");
    check_shape(op, "lse", lse, lse.dim() == 3, "[batch, heads, queries]");
    PrefixAttention pass = a.pass();

    Tensor grad_query = torch::stable::new_empty(query, {0});
    if (need_tokens) grad_query = empty_heads(query, a.batch, a.heads, a.queries, a.head_dim);
    Tensor parts = torch::stable::new_empty(query, {0}, ScalarType::Float);
    if (need_prefix && !a.nothing()) {
        const int64_t size = a.prefix_length * prefix_padded(a.head_dim);
        parts = torch::stable::new_zeros(query, {prefix_count(pass) * pass.chunks * 2 * size}, ScalarType::Float);
        pass.grad_prefix = parts.mutable_data_ptr<float>();
    }
    const bool any_tokens = need_tokens && a.keys > 0 && !a.nothing();
    std::vector<Tensor> grad_keys, grad_values;
    for (const Part& part : a.nothing() ? std::vector<Part>() : a.parts()) {
        Tensor tokens_grad_query;
        pass.tokens_grad_query = {};
        if (any_tokens && part.keys > 0) {
            Tensor grad_key, grad_value;
            std::tie(tokens_grad_query, grad_key, grad_value) =
                FlashCall(a, part).backward(a.view_of(dy, part), a.view_of(y, part), a.view_of(lse, part));
            pass.tokens_grad_query = heads_of(tokens_grad_query);
            grad_keys.push_back(grad_key);
            grad_values.push_back(grad_value);
        }
        pass.rows = part.rows;
        pass.query = a.heads_of(a.query, part);
        pass.out = a.heads_of(y, part);
        pass.lse = a.heads_of(lse, part);
        pass.grad_out = a.heads_of(dy, part);
        if (need_tokens) pass.grad_query = a.heads_of(grad_query, part);
        run(op, pass, &PrefixKernels::backward);
    }

    const auto grad_tokens = [&](const std::vector<Tensor>& of_heads) {
        if (any_tokens) return sum_of(op, a, of_heads);
        if (!need_tokens) return torch::stable::new_empty(key, {0});
        Tensor zeros = empty_heads(key, a.batch, a.kv_heads, a.keys, a.head_dim);
        return torch::stable::zero_(zeros);
    };
    const auto grad_prefix = [&](int64_t part, const Tensor& like) {
        if (!need_prefix) return torch::stable::new_empty(like, {0});
        if (a.nothing()) return torch::stable::new_zeros(like, like.sizes());
        return grad_prefix_of(a, pass, parts, part, like);
    };
    return {grad_query, grad_tokens(grad_keys), grad_tokens(grad_values), grad_prefix(0, prefix_key),
            grad_prefix(1, prefix_value)};
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("prefix_attention", TORCH_BOX(&prefix_attention));
    m.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
}

}  // namespace peftkern
