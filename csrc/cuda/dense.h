// Products of a dequantised weight by torch's own matmul: what runs where no fused kernel does.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

namespace peftkern {

// out = a b, into `out`: unlike mm itself, this form is not changed by autocast.
inline void matmul_into(torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                      torch::stable::detail::from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // the result is a new handle of `out`
}

// x W^T + bias, rounded once.
inline torch::stable::Tensor linear_of(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                                       const torch::stable::Tensor& bias) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                      torch::stable::detail::from(std::optional<torch::stable::Tensor>(bias))};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace peftkern
