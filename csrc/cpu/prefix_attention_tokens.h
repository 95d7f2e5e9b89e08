// The tokens' side of prefix_attention: the checked arguments, and torch's flash attention in parts of them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/engine.h"
#include "cpu/prefix_attention.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;

// torch's flash attention computes what a mask hides, and with is_causal what is hidden in blocks of 512 keys. Blocks
// of queries, each with the leading keys that it sees, are faster (512 causal tokens: a quarter less). 192 rows are the
// fewest for which flash attention takes 64 at once.
constexpr int64_t kBlockRows = 192;
// No score makes up for such a mask; as bf16 below.
constexpr float kHidden = -1e30f;
constexpr uint16_t kHiddenBits = 0xf149;
// From here on torch's own causality skips as much.
constexpr int64_t kOwnCausality = 1024;

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
        if (is_causal && queries > kBlockRows && queries < kOwnCausality)
            triangle = triangle_of(query, (queries - 1) / kBlockRows * kBlockRows, kBlockRows);
        if (has_mask) {
            mask = checked(op, "attn_mask", *attn_mask, 4, "[batch, heads, queries, keys]");
            const bool right = sizes(mask) == std::vector<int64_t>{batch, heads, queries, keys};
            check_shape(op, "attn_mask", mask, right, "[batch, heads, queries, keys]");
        }
    }

    bool per_batch() const { return prefix_key.dim() == 4; }
    bool nothing() const { return batch == 0 || heads == 0 || queries == 0; }
    int64_t rows() const { return folded ? group : queries; }

    // The calls of flash attention: each head of a group, and blocks of queries where these see fewer keys.
    std::vector<Part> parts() const {
        std::vector<Part> blocks;
        int64_t seen = 0;
        if (queries > kBlockRows && (has_mask || triangle.defined()))
            for (int64_t begin = 0; begin < queries; begin += kBlockRows) {
                const int64_t count = std::min(kBlockRows, queries - begin);
                blocks.push_back({0, begin, count, has_mask ? seen_keys(begin, count) : std::min(begin + count, keys)});
                seen += count * blocks.back().keys;
            }
        // Blocks cost calls and sums of gradients.
        if (blocks.empty() || seen > 9 * (queries * keys / 10)) blocks = {{0, 0, rows(), keys}};
        std::vector<Part> parts;
        for (int64_t head = 0; head < (folded ? 1 : group); ++head)
            for (const Part& block : blocks) parts.push_back({head, block.begin, block.rows, block.keys});
        return parts;
    }

    // The leading keys of which the mask lets some query of a block see the last.
    int64_t seen_keys(int64_t begin, int64_t count) const {
        if (mask.stride(3) == 0 || mask.scalar_type() == ScalarType::Half) return keys;
        const bool wide = mask.scalar_type() == ScalarType::Float;
        const auto hidden = [&](int64_t at) {
            if (wide) return mask.const_data_ptr<float>()[at] <= kHidden;
            const uint16_t bits = static_cast<const uint16_t*>(mask.const_data_ptr())[at];
            return bits >= kHiddenBits && bits <= 0xff80;  // -infinity; beyond it is NaN
        };
        const auto sizes = [&](int64_t dim, int64_t size) { return mask.stride(dim) == 0 ? 1 : size; };
        int64_t seen = 0;
        for (int64_t b = 0; b < sizes(0, batch); ++b)
            for (int64_t h = 0; h < sizes(1, heads); ++h)
                for (int64_t i = begin + sizes(2, count) - 1; i >= begin; --i) {
                    const int64_t row = b * mask.stride(0) + h * mask.stride(1) + i * mask.stride(2);
                    for (int64_t j = keys; j > seen; --j)
                        if (!hidden(row + (j - 1) * mask.stride(3))) seen = j;
                }
        return seen;
    }

    // Of one part: [batch, kv_heads, rows] of a tensor [batch, heads, queries, ...].
    Heads heads_of(const Tensor& t, const Part& part) const {
        const int64_t bytes = element_bytes(t), row = folded ? t.stride(1) : t.stride(2);
        const int64_t offset = part.head * t.stride(1) + part.begin * row;
        return {static_cast<char*>(t.data_ptr()) + offset * bytes, t.stride(0), group * t.stride(1), row, dtype_of(t)};
    }
    Tensor view_of(const Tensor& t, const Part& part, int64_t columns = 0) const {
        const Heads h = heads_of(t, part);
        std::vector<int64_t> sizes = {batch, kv_heads, part.rows}, strides = {h.batch, h.head, h.row};
        if (t.dim() == 4) {
            sizes.push_back(columns ? columns : t.size(3));
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
        if (has_mask) return view_of(mask, part, part.keys);
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

}  // namespace
}  // namespace peftkern
