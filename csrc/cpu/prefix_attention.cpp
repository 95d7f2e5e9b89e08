// prefix_attention on the CPU: torch's flash attention over the tokens, our kernels for the prefix and the merge.
// Formula and reference: peftkern/ops/prefix_attention.py.
#include "cpu/prefix_attention.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
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
// torch's causal flash attention takes keys in blocks of 512 and computes the hidden part of them: up to this many
// queries, blocks of these, each with the keys that it sees, are faster (512 tokens: a quarter less). 192 rows are the
// fewest for which flash attention takes 64 at once.
constexpr int64_t kCausalRows = 192;
constexpr int64_t kOwnCausality = 1024;
// Fewer products are not worth another thread.
constexpr int64_t kGrainProducts = 1 << 18;
constexpr int64_t kGrainElements = 1 << 15;

Dtype dtype_of(const Tensor& t) {
    if (t.scalar_type() == ScalarType::BFloat16) return Dtype::kBFloat16;
    return t.scalar_type() == ScalarType::Half ? Dtype::kFloat16 : Dtype::kFloat32;
}

// The last dimension dense, as flash attention and the kernels read it.
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

int64_t element_bytes(const Tensor& t) {
    return dtype_of(t) == Dtype::kFloat32 ? 4 : 2;
}

// Queries [begin, begin + rows) of one head of every group, or of all heads where these are the rows, and the leading
// keys that they see.
struct Part {
    int64_t head, begin, rows, keys;
};

// [rows, begin + rows] with 0 where row i may see column j <= begin + i, else -infinity.
Tensor triangle_of(const Tensor& query, int64_t begin, int64_t rows) {
    const bool half = query.scalar_type() == ScalarType::Half;
    const ScalarType type = half ? ScalarType::Float : query.scalar_type();
    Tensor mask = torch::stable::new_zeros(query, {rows, begin + rows}, type);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = begin + i + 1; j < begin + rows; ++j) {
            const int64_t at = i * (begin + rows) + j;
            if (type == ScalarType::Float)
                mask.mutable_data_ptr<float>()[at] = -INFINITY;
            else
                static_cast<uint16_t*>(mask.data_ptr())[at] = 0xff80;  // bf16
        }
    return mask;
}

// The arguments of both passes.
struct Arguments {
    Tensor query, key, value, prefix_key, prefix_value, mask;
    int64_t batch, heads, kv_heads, group, queries, keys, head_dim, prefix_length;
    bool has_mask, is_causal;
    double scale;
    // One query for each head: those that share keys and values become the rows of one attention, and these are read
    // once. Else the heads of a group take turns.
    bool folded;
    Tensor triangle;  // the mask of blocks of a causal attention, see mask_of

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
          has_mask(attn_mask.has_value()),
          is_causal(causal),
          scale(scale_) {
        const auto sizes = [](const Tensor& t) { return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()); };
        prefix_length = pk.size(pk.dim() - 2);
        const std::vector<int64_t> tokens = {batch, kv_heads, keys, head_dim};
        std::vector<int64_t> prefix = {kv_heads, prefix_length, head_dim};
        if (pk.dim() == 4) prefix.insert(prefix.begin(), batch);
        check_shape(op, "prefix_key", pk, prefix_length > 0, "[kv_heads, length, head_dim] with a positive length");
        check_shape(op, "key", key, sizes(key) == tokens, "[batch, kv_heads, keys, head_dim] with query's sizes");
        check_shape(op, "value", value, sizes(value) == tokens, "of key");
        check_shape(op, "prefix_key", pk, sizes(pk) == prefix, "[kv_heads, length, head_dim] with key's sizes");
        check_shape(op, "prefix_value", pv, sizes(pv) == prefix, "of prefix_key");
        check_shape(op, "query", query, kv_heads > 0 && heads % kv_heads == 0, "with a multiple of key's heads");
        check_shape(op, "query", query, head_dim > 0, "[batch, heads, queries, head_dim]");
        for (const Tensor* t : {&key, &value})
            check_dtype(op, "key and value", *t, t->scalar_type() == query.scalar_type(), "of query's dtype");
        group = heads / kv_heads;
        folded = queries == 1 && group > 1 && !is_causal;
        if (is_causal && queries > kCausalRows && queries < kOwnCausality)
            triangle = triangle_of(query, (queries - 1) / kCausalRows * kCausalRows, kCausalRows);
        if (has_mask) {
            mask = checked(op, "attn_mask", *attn_mask, 4, "[batch, heads, queries, keys]");
            const bool right = sizes(mask) == std::vector<int64_t>{batch, heads, queries, keys};
            check_shape(op, "attn_mask", mask, right, "[batch, heads, queries, keys]");
        }
    }

    bool per_batch() const { return prefix_key.dim() == 4; }
    bool nothing() const { return batch == 0 || heads == 0 || queries == 0; }
    int64_t rows() const { return folded ? group : queries; }

    // The calls of flash attention: each head of a group, and where it pays the blocks of a causal attention.
    std::vector<Part> parts() const {
        std::vector<Part> parts;
        const bool blocked = is_causal && queries > kCausalRows && queries < kOwnCausality;
        const int64_t step = blocked ? kCausalRows : std::max<int64_t>(1, rows());
        for (int64_t head = 0; head < (folded ? 1 : group); ++head)
            for (int64_t begin = 0; begin < rows(); begin += step) {
                const int64_t count = std::min(step, rows() - begin);
                parts.push_back({head, begin, count, blocked ? std::min(begin + count, keys) : keys});
            }
        return parts;
    }

    // Of one part: [batch, kv_heads, rows] of a tensor [batch, heads, queries, ...].
    Heads heads_of(const Tensor& t, const Part& part) const {
        const int64_t bytes = element_bytes(t), row = folded ? t.stride(1) : t.stride(2);
        const int64_t offset = part.head * t.stride(1) + part.begin * row;
        return {static_cast<char*>(t.data_ptr()) + offset * bytes, t.stride(0), group * t.stride(1), row, dtype_of(t)};
    }
    Tensor view_of(const Tensor& t, const Part& part) const {
        const Heads h = heads_of(t, part);
        std::vector<int64_t> sizes = {batch, kv_heads, part.rows}, strides = {h.batch, h.head, h.row};
        if (t.dim() == 4) {
            sizes.push_back(t.size(3));
            strides.push_back(t.stride(3));
        }
        return torch::stable::from_blob(h.data, sizes, strides, t.device(), t.scalar_type());
    }
    // The keys or values that a part sees.
    Tensor seen_of(const Tensor& t, const Part& part) const {
        const std::vector<int64_t> sizes = {batch, kv_heads, part.keys, head_dim};
        const std::vector<int64_t> strides = {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
        return torch::stable::from_blob(t.data_ptr(), sizes, strides, t.device(), t.scalar_type());
    }
    // An undefined tensor where there is none.
    Tensor mask_of(const Part& part) const {
        if (has_mask) return view_of(mask, part);
        if (part.begin == 0) return Tensor();
        // Query i of a block sees its first begin + i + 1 keys: the mask of all blocks has the last block's columns.
        const int64_t skipped = (triangle.size(1) - triangle.size(0) - part.begin) * element_bytes(triangle);
        const std::vector<int64_t> sizes = {1, 1, part.rows, part.keys}, strides = {0, 0, triangle.stride(0), 1};
        return torch::stable::from_blob(static_cast<char*>(triangle.data_ptr()) + skipped, sizes, strides,
                                        triangle.device(), triangle.scalar_type());
    }
    Heads prefix_of(const Tensor& t) const {
        const int64_t first = t.dim() - 3;
        return {t.data_ptr(), per_batch() ? t.stride(0) : 0, t.stride(first), t.stride(first + 1), dtype_of(t)};
    }

    PrefixAttention pass() const {
        PrefixAttention pass = {};
        pass.batch = batch;
        pass.kv_heads = kv_heads;
        pass.rows = rows();
        pass.head_dim = head_dim;
        pass.prefix_length = prefix_length;
        pass.per_batch = per_batch();
        pass.scale = static_cast<float>(scale);
        pass.chunks = prefix_chunks(pass);
        pass.prefix_key = prefix_of(prefix_key);
        pass.prefix_value = prefix_of(prefix_value);
        return pass;
    }
};

// What flash attention gives one part: [batch, kv_heads, rows, head_dim].
Heads heads_of(const Tensor& t) {
    return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), dtype_of(t)};
}

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

// torch's op for one part: the handles of its tensors, alive as long as this.
struct FlashCall {
    Tensor query, key, value, mask;
    AtenTensorHandle mask_handle;
    double scale;
    bool is_causal;

    FlashCall(const Arguments& a, const Part& part)
        : query(a.view_of(a.query, part)),
          key(a.seen_of(a.key, part)),
          value(a.seen_of(a.value, part)),
          mask(a.mask_of(part)),
          mask_handle(mask.get()),
          scale(a.scale),
          is_causal(a.is_causal && !mask.defined()) {}

    std::tuple<Tensor, Tensor> forward() {
        AtenTensorHandle out, lse;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
            query.get(), key.get(), value.get(), 0.0, is_causal, mask.defined() ? &mask_handle : nullptr, &scale, &out,
            &lse));
        return {Tensor(out), Tensor(lse)};
    }
    std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& out, const Tensor& lse) {
        AtenTensorHandle grad_query, grad_key, grad_value;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out.get(), query.get(), key.get(), value.get(), out.get(), lse.get(), 0.0, is_causal,
            mask.defined() ? &mask_handle : nullptr, &scale, &grad_query, &grad_key, &grad_value));
        return {Tensor(grad_query), Tensor(grad_key), Tensor(grad_value)};
    }
};

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
        if (a.keys > 0) {
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
        if (any_tokens) {
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
