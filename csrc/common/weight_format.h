// A frozen weight as ops take it: tensors, and for each weight kWeightFields integers that say what they are. Several
// weights follow each other in both lists.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"

namespace peftkern {

using Tensors = std::vector<torch::stable::Tensor>;
using Integers = std::vector<int64_t>;

// As in peftkern/ops/_linear.py. Dense: [out, in]. NF4: codes, absmax and, where that is nested, nested_absmax,
// nested_quant_map, offset.
constexpr int64_t kDenseFormat = 0, kNf4Format = 1;
constexpr size_t kWeightFields = 5;

// One weight: its tensors, which follow each other from `tensors` on, and its integers in their order.
struct WeightParts {
    const torch::stable::Tensor* tensors;
    int64_t format, block_size, out_features, in_features, count;

    std::string shape() const { return "[" + std::to_string(out_features) + ", " + std::to_string(in_features) + "]"; }
    bool nested() const { return count == 5; }
};

// The weight that begins at these places of the lists, which must outlive it.
inline WeightParts weight_at(const char* op, const Tensors& w, const Integers& wf, size_t first, size_t place) {
    const WeightParts parts = {w.data() + first, wf[place], wf[place + 1], wf[place + 2], wf[place + 3], wf[place + 4]};
    const bool known = parts.format == kDenseFormat || parts.format == kNf4Format;
    PEFTKERN_CHECK(known, op, ": wf has an unknown format, ", parts.format);
    PEFTKERN_CHECK(parts.out_features >= 0 && parts.in_features >= 0, op,
                   ": weight must have a shape that is not negative, got ", parts.shape());
    PEFTKERN_CHECK(parts.count >= 0 && static_cast<size_t>(parts.count) <= w.size() - first, op, ": w must have ",
                   parts.count, " tensors for weight ", place / kWeightFields, ", got ", w.size() - first);
    if (parts.format == kDenseFormat) {
        PEFTKERN_CHECK(parts.count == 1, op, ": a dense weight must be 1 tensor, got ", parts.count);
        return parts;
    }
    check_block_size(op, parts.block_size);
    PEFTKERN_CHECK(parts.count >= 2, op, ": absmax is missing");
    PEFTKERN_CHECK(parts.count == 2 || parts.count == 5, op,
                   ": nested_absmax, nested_quant_map and offset must be given together");
    return parts;
}

inline std::vector<WeightParts> weights_of(const char* op, const Tensors& w, const Integers& wf) {
    PEFTKERN_CHECK(wf.size() % kWeightFields == 0, op, ": wf must have ", kWeightFields,
                   " entries for each weight, got ", wf.size());
    std::vector<WeightParts> weights;
    size_t first = 0;
    for (size_t place = 0; place < wf.size(); place += kWeightFields) {
        weights.push_back(weight_at(op, w, wf, first, place));
        first += static_cast<size_t>(weights.back().count);
    }
    PEFTKERN_CHECK(first == w.size(), op, ": w must have ", first, " tensors, as wf says, got ", w.size());
    return weights;
}

// Of an op of one weight.
inline WeightParts weight_of(const char* op, const Tensors& w, const Integers& wf) {
    PEFTKERN_CHECK(wf.size() == kWeightFields, op, ": wf must have ", kWeightFields, " entries, got ", wf.size());
    const WeightParts parts = weight_at(op, w, wf, 0, 0);
    PEFTKERN_CHECK(w.size() == static_cast<size_t>(parts.count), op, ": w must have ", parts.count,
                   " tensors, as wf says, got ", w.size());
    return parts;
}

// The tensor whose device is that of the weight.
inline const torch::stable::Tensor& first_of(const char* op, const Tensors& w) {
    PEFTKERN_CHECK(!w.empty(), op, ": w must have a tensor");
    return w[0];
}

// The last dimension of what is multiplied by a weight.
inline void check_features(const char* op, const char* name, const torch::stable::Tensor& tensor, int64_t features) {
    check_shape(op, name, tensor, tensor.dim() > 0 && tensor.size(tensor.dim() - 1) == features,
                "[..., " + std::to_string(features) + "]");
}

}  // namespace peftkern
