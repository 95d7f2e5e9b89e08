// prompt_embedding on the CPU: every output row is a copy of one row, and every row of a gradient a sum of some.
// Formula and reference: peftkern/ops/prompt_embedding.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/engine.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kIgnoredLabel = -100;
// Copying fewer bytes is not worth another thread.
constexpr int64_t kGrainBytes = 1 << 17;

std::string sizes_text(int64_t first, int64_t second) {
    return "[" + std::to_string(first) + ", " + std::to_string(second) + "]";
}

Tensor integers_of(const char* op, const char* name, const Tensor& tensor, bool right, const std::string& wanted) {
    check_dtype(op, name, tensor, tensor.scalar_type() == ScalarType::Long, "int64");
    check_shape(op, name, tensor, right, wanted);
    return torch::stable::contiguous(tensor);
}

// Where each row of the output comes from: a token's id or, negative, -1 - a row of all prompts'.
struct Sources {
    int64_t batch, tokens, length;
    std::vector<int64_t> of_row;  // [batch * length]
};

// All ids are checked here, before anything is written.
Sources sources_of(const char* op, const Tensor& input_ids, int64_t vocabulary, const OptionalTensor& prompt_ids,
                   const OptionalTensor& prompt_places, int64_t prompts, int64_t rows) {
    const Tensor ids = integers_of(op, "input_ids", input_ids, input_ids.dim() == 2, "[batch, tokens]");
    PEFTKERN_CHECK(vocabulary >= 0 && prompts >= 0, op, ": there must be no fewer than 0 embeddings and prompts, got ",
                   vocabulary, " and ", prompts);
    PEFTKERN_CHECK(prompt_ids.has_value() || prompts == 1, op, ": without prompt_ids there must be 1 prompt, got ",
                   prompts);
    Sources sources{ids.size(0), ids.size(1), rows + ids.size(1), {}};
    const int64_t *chosen = nullptr, *places = nullptr;
    Tensor kept_prompt_ids, kept_places;
    if (prompt_ids.has_value()) {
        const bool right = prompt_ids->dim() == 1 && prompt_ids->size(0) == sources.batch;
        kept_prompt_ids = integers_of(op, "prompt_ids", *prompt_ids, right, "[" + std::to_string(sources.batch) + "]");
        chosen = kept_prompt_ids.const_data_ptr<int64_t>();
    }
    int64_t places_stride = 0;
    if (prompt_places.has_value()) {
        const int64_t dim = prompt_places->dim();
        const bool right =
            (dim == 1 || (dim == 2 && prompt_places->size(0) == sources.batch)) && prompt_places->size(dim - 1) == rows;
        kept_places = integers_of(op, "prompt_places", *prompt_places, right, "[..., " + std::to_string(rows) + "]");
        places = kept_places.const_data_ptr<int64_t>();
        places_stride = dim == 2 ? rows : 0;
    }
    const int64_t* id = ids.const_data_ptr<int64_t>();
    sources.of_row.reserve(static_cast<size_t>(sources.batch * sources.length));
    for (int64_t b = 0; b < sources.batch; ++b) {
        const int64_t prompt = chosen ? chosen[b] : 0;
        PEFTKERN_CHECK(!chosen || (prompt >= 0 && prompt < prompts), op, ": prompt_ids must be from 0 to ", prompts - 1,
                       ", got ", prompt);
        int64_t row = 0, token = 0;
        for (int64_t at = 0; at < sources.length; ++at) {
            if (row < rows && (places ? places[b * places_stride + row] : row) == at) {
                sources.of_row.push_back(-1 - (prompt * rows + row++));
                continue;
            }
            PEFTKERN_CHECK(token++ < sources.tokens, op, ": prompt_places must be ascending, from 0 to ",
                           sources.length - 1);
            PEFTKERN_CHECK(*id >= 0 && *id < vocabulary, op, ": input_ids must be from 0 to ", vocabulary - 1, ", got ",
                           *id);
            sources.of_row.push_back(*id++);
        }
    }
    return sources;
}

// The bytes of 1 in a dtype, as a little-endian integer.
int64_t bits_of_one(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return 0x3f800000;
        case ScalarType::Double:
            return 0x3ff0000000000000;
        case ScalarType::BFloat16:
            return 0x3f80;
        case ScalarType::Half:
            return 0x3c00;
        default:
            return 1;
    }
}

Tensor checked(const char* op, const char* name, const Tensor& values, const Sources& sources) {
    PEFTKERN_CHECK(values.is_cpu(), op, ": ", name, " must be on the CPU");
    const bool right = values.dim() == 2 && values.size(0) == sources.batch && values.size(1) == sources.tokens;
    check_shape(op, name, values, right, sizes_text(sources.batch, sources.tokens));
    return torch::stable::contiguous(values);
}

// `values` [batch, tokens], with the low bytes of `fill` for the prompt's rows.
Tensor extended(const Tensor& values, const Sources& sources, int64_t fill) {
    Tensor out = torch::stable::new_empty(values, {sources.batch, sources.length});
    const size_t bytes = values.element_size();
    const auto* from = static_cast<const uint8_t*>(values.const_data_ptr());
    auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
    const int64_t *row = sources.of_row.data(), *end = row + sources.of_row.size();
    while (row < end) {
        if (*row < 0) {
            std::memcpy(to, &fill, bytes);
            to += bytes;
            ++row;
            continue;
        }
        const int64_t* stop = std::find_if(row, end, [](int64_t source) { return source < 0; });
        const size_t run = static_cast<size_t>(stop - row) * bytes;
        std::memcpy(to, from, run);
        to += run;
        from += run;
        row = stop;
    }
    return out;
}

// A prompt's row goes on from the token before it, and all that follows moves by one.
Tensor extended_positions(const Tensor& position_ids, const Sources& sources) {
    Tensor out = torch::stable::new_empty(position_ids, {sources.batch, sources.length});
    const auto* given = position_ids.const_data_ptr<int64_t>();
    auto* to = out.mutable_data_ptr<int64_t>();
    const int64_t* source = sources.of_row.data();
    for (int64_t b = 0; b < sources.batch; ++b) {
        int64_t rows_before = 0, next = 0;
        for (int64_t at = 0; at < sources.length; ++at) {
            if (*source++ < 0) {
                *to++ = next + rows_before++;
            } else {
                next = *given + 1;
                *to++ = *given++ + rows_before;
            }
        }
    }
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prompt_embedding(Tensor input_ids, Tensor embedding_weight, Tensor prompt,
                                                            OptionalTensor prompt_ids, OptionalTensor attention_mask,
                                                            OptionalTensor labels, OptionalTensor position_ids,
                                                            OptionalTensor prompt_places) {
    const char* op = "prompt_embedding";
    check_shape(op, "embedding_weight", embedding_weight, embedding_weight.dim() == 2, "[vocabulary, features]");
    const Rows table = rows_of(op, "embedding_weight", embedding_weight);
    const int64_t dim = prompt_ids.has_value() ? 3 : 2, features = table.columns;
    check_shape(op, "prompt", prompt, prompt.dim() == dim && prompt.size(dim - 1) == features,
                "[..., rows, " + std::to_string(features) + "]");
    const Rows prompt_rows = rows_of(op, "prompt", prompt);
    const Sources sources = sources_of(op, input_ids, table.rows, prompt_ids, prompt_places,
                                       dim == 3 ? prompt.size(0) : 1, prompt.size(dim - 2));

    // What was not given comes back empty; an op's outputs may not be one tensor.
    const auto given = [&](const char* name, const OptionalTensor& values) {
        return values.has_value() ? checked(op, name, *values, sources) : torch::stable::new_empty(input_ids, {0});
    };
    Tensor mask = given("attention_mask", attention_mask);
    Tensor targets = integers_of(op, "labels", given("labels", labels), true, "");
    Tensor positions = integers_of(op, "position_ids", given("position_ids", position_ids), true, "");
    if (attention_mask.has_value()) mask = extended(mask, sources, bits_of_one(mask.scalar_type()));
    if (labels.has_value()) targets = extended(targets, sources, kIgnoredLabel);
    if (position_ids.has_value()) positions = extended_positions(positions, sources);

    const Tensor rounded =
        torch::stable::contiguous(torch::stable::to(prompt_rows.tensor, embedding_weight.scalar_type()));
    Tensor out = torch::stable::new_empty(embedding_weight, {sources.batch, sources.length, features});
    const auto element = static_cast<int64_t>(embedding_weight.element_size());
    const int64_t bytes = features * element, stride = table.matrix.stride * element;
    const auto* embeddings = static_cast<const uint8_t*>(table.matrix.data);
    const auto* own = static_cast<const uint8_t*>(rounded.const_data_ptr());
    auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes));
    torch::stable::parallel_for(0, sources.batch * sources.length, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t source = sources.of_row[static_cast<size_t>(i)];
            const uint8_t* from = source < 0 ? own + (-1 - source) * bytes : embeddings + source * stride;
            std::memcpy(to + i * bytes, from, static_cast<size_t>(bytes));
        }
    });
    return {out, mask, targets, positions};
}

// Sums into row key(source) of `out` [count, features], in the order of the batch, the rows whose key is not negative.
template <class Key>
void sum_by_key(const char* op, const Rows& grad, const Sources& sources, const Tensor& out, int64_t count, Key key) {
    std::vector<int64_t> offsets(static_cast<size_t>(count) + 1);
    for (int64_t source : sources.of_row)
        if (key(source) >= 0) ++offsets[static_cast<size_t>(key(source)) + 1];
    for (size_t i = 1; i < offsets.size(); ++i) offsets[i] += offsets[i - 1];
    std::vector<int64_t> rows(static_cast<size_t>(offsets.back())), next(offsets);
    for (size_t i = 0; i < sources.of_row.size(); ++i) {
        const int64_t k = key(sources.of_row[i]);
        if (k >= 0) rows[static_cast<size_t>(next[static_cast<size_t>(k)]++)] = static_cast<int64_t>(i);
    }
    sum_rows(op,
             {grad.matrix, offsets.data(), rows.data(), out.mutable_data_ptr(), rows_of(op, "out", out).matrix.dtype,
              grad.columns},
             count);
}

std::tuple<Tensor, Tensor> prompt_embedding_backward(Tensor grad, Tensor input_ids, OptionalTensor prompt_ids,
                                                     OptionalTensor prompt_places, int64_t vocabulary, int64_t prompts,
                                                     ScalarType prompt_dtype, bool need_weight, bool need_prompt) {
    const char* op = "prompt_embedding_backward";
    check_shape(op, "grad", grad, grad.dim() == 3, "[batch, rows + tokens, features]");
    const Rows rows = rows_of(op, "grad", grad);
    check_shape(op, "input_ids", input_ids, input_ids.dim() == 2 && input_ids.size(1) <= grad.size(1),
                "[batch, tokens], no more than grad's");
    const int64_t prompt_rows = grad.size(1) - input_ids.size(1);
    const Sources sources = sources_of(op, input_ids, vocabulary, prompt_ids, prompt_places, prompts, prompt_rows);
    check_shape(op, "grad", grad, grad.size(0) == sources.batch, "[batch, rows + tokens, features] with input_ids'");

    Tensor grad_weight = torch::stable::new_empty(grad, {0});
    Tensor grad_prompt = torch::stable::new_empty(grad, {0}, prompt_dtype);
    if (need_weight) {
        grad_weight = torch::stable::new_empty(grad, {vocabulary, rows.columns});
        sum_by_key(op, rows, sources, grad_weight, vocabulary, [](int64_t source) { return source; });
    }
    if (need_prompt) {
        grad_prompt = torch::stable::new_empty(grad, {prompts, prompt_rows, rows.columns}, prompt_dtype);
        sum_by_key(op, rows, sources, grad_prompt, prompts * prompt_rows, [](int64_t source) { return -1 - source; });
    }
    return {grad_weight, grad_prompt};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("prompt_embedding", TORCH_BOX(&prompt_embedding));
    m.impl("prompt_embedding_backward", TORCH_BOX(&prompt_embedding_backward));
}

}  // namespace peftkern
