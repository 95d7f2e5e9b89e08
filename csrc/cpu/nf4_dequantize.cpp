// nf4_dequantize on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/engine.h"
#include "cpu/quantize_host.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "nf4_dequantize";

int64_t product(const std::vector<int64_t>& shape) {
    int64_t result = 1;
    for (int64_t size : shape) {
        PEFTKERN_CHECK(size >= 0, kOp, ": shape must not be negative, got ", size);
        result *= size;
    }
    return result;
}

Tensor nf4_dequantize(const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
                      const OptionalTensor& nested_quant_map, const OptionalTensor& offset, int64_t block_size,
                      const std::vector<int64_t>& shape, ScalarType dtype) {
    const Dtype out_dtype = element_dtype(kOp, "dtype", dtype);
    const int64_t numel = product(shape);
    const Weight weight = weight_of(kOp, codes, absmax, nested_absmax, nested_quant_map, offset, block_size, numel, 1);
    const QuantizeKernels& kernels = quantize_kernels(kOp);
    Tensor out = torch::stable::empty(shape, dtype);
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
