// cross_entropy on the CPU: logits are read in their own dtype, and nothing of their size is made but their gradient.
// Formula and reference: peftkern/ops/cross_entropy.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "common/check.h"
#include "cpu/engine.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;

// The arguments of both passes.
struct Arguments {
    Rows logits;
    Tensor targets;
    CrossEntropy pass = {};

    Arguments(const char* op, const Tensor& logits_, const Tensor& target, int64_t ignore_index)
        : logits(rows_of(op, "logits", logits_)), targets(target) {
        check_shape(op, "logits", logits_, logits_.dim() == 2, "[rows, classes]");
        check_dtype(op, "target", target, target.scalar_type() == ScalarType::Long, "int64");
        const bool right = target.dim() == 1 && target.size(0) == logits.rows;
        check_shape(op, "target", target, right, "[" + std::to_string(logits.rows) + "]");
        targets = torch::stable::contiguous(target);
        pass.logits = logits.matrix;
        pass.columns = logits.columns;
        pass.targets = targets.const_data_ptr<int64_t>();
        pass.ignored = ignore_index;
        for (int64_t row = 0; row < logits.rows; ++row) {
            const int64_t at = pass.targets[row];
            PEFTKERN_CHECK(at == ignore_index || (at >= 0 && at < logits.columns), op, ": target must be from 0 to ",
                           logits.columns - 1, " or ", ignore_index, ", got ", at);
        }
    }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor logits, Tensor target, int64_t ignore_index) {
    const char* op = "cross_entropy";
    Arguments a(op, logits, target, ignore_index);
    const auto empty = [&] { return torch::stable::new_empty(logits, {a.logits.rows}, ScalarType::Float); };
    Tensor losses = empty(), top = empty(), log_sum = empty();
    a.pass.losses = losses.mutable_data_ptr<float>();
    a.pass.top = top.mutable_data_ptr<float>();
    a.pass.log_sum = log_sum.mutable_data_ptr<float>();
    run(op, a.pass, &GemmKernels::cross_entropy, a.logits.rows);
    return {losses, top, log_sum};
}

Tensor cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor target, Tensor top, Tensor log_sum,
                              int64_t ignore_index) {
    const char* op = "cross_entropy_backward";
    Arguments a(op, logits, target, ignore_index);
    const auto of_rows = [&](const char* name, const Tensor& tensor) {
        check_dtype(op, name, tensor, tensor.scalar_type() == ScalarType::Float, "fp32");
        check_shape(op, name, tensor, tensor.dim() == 1 && tensor.size(0) == a.logits.rows, "[rows]");
        return torch::stable::contiguous(tensor);
    };
    Tensor outer = of_rows("grad_losses", grad_losses), tops = of_rows("top", top), sums = of_rows("log_sum", log_sum);
    Tensor grad = torch::stable::new_empty(logits, {a.logits.rows, a.logits.columns});
    a.pass.grad_losses = outer.const_data_ptr<float>();
    a.pass.top = tops.mutable_data_ptr<float>();
    a.pass.log_sum = sums.mutable_data_ptr<float>();
    a.pass.grad_logits = grad.mutable_data_ptr();
    run(op, a.pass, &GemmKernels::cross_entropy_backward, a.logits.rows);
    return grad;
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
    m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace peftkern
