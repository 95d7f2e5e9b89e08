// nf4_dequantize on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/engine.h"
#include "cpu/quantize_host.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "nf4_dequantize";

Tensor nf4_dequantize(const Tensors& w, const Integers& wf, ScalarType dtype) {
    const Dtype out_dtype = element_dtype(kOp, "dtype", dtype);
    const Weight weight = Weight::of(kOp, w, wf);
    PEFTKERN_CHECK(weight.is_nf4, kOp, ": weight must be NF4, got a dense one");
    const int64_t numel = weight.out_features * weight.in_features, block_size = weight.nf4.block_size;
    const QuantizeKernels& kernels = quantize_kernels(kOp);
    Tensor out = torch::stable::empty({weight.out_features, weight.in_features}, dtype);
    const Dequantize task{weight.nf4, numel, out.mutable_data_ptr(), out_dtype};
    torch::stable::parallel_for(0, ceil_divide(numel, block_size), blocks_per_thread(block_size),
                                [&](int64_t begin, int64_t end) { kernels.dequantize(&task, begin, end); });
    return out;
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("nf4_dequantize", TORCH_BOX(&peftkern::nf4_dequantize));
}
