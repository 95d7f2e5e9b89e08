// The table of everything that is compiled once for each instruction set, whose Simd the including file chose.
#pragma once

#include "cpu/activation_kernel.h"
#include "cpu/gemm_kernel.h"
#include "cpu/loss_kernel.h"
#include "cpu/passes_kernel.h"
#include "cpu/prefix_backward_kernel.h"
#include "cpu/prefix_kernel.h"

namespace peftkern {
namespace {

template <class MainDot, class Decode = NoDecode>
constexpr GemmKernels kernels() {
    return {run_tile<MainDot, Decode>, Workspace::bytes, split_dropout, scale_columns,
            gated_activation,          sum_rows,         activate,      cross_entropy,
            cross_entropy_backward};
}

template <class MainDot>
constexpr PrefixKernels prefix_kernels() {
    return {prefix_forward<MainDot>, prefix_forward_bytes<MainDot>, prefix_backward<MainDot>,
            prefix_backward_bytes<MainDot>};
}

}  // namespace
}  // namespace peftkern
