// nf4_quantize, nf4_quantize_absmax and nf4_dequantize for CUDA tensors. Formulas: peftkern/ops/nf4_quantize.py and
// peftkern/ops/nf4_dequantize.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/host.h"

namespace peftkern {
namespace {

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, int64_t block_size) {
    constexpr const char* op = "nf4_quantize";
    const Dtype dtype = element_dtype(op, "weight", weight.scalar_type());
    check_block_size(op, block_size);
    const OnDevice device(op, weight);
    const Tensor dense = torch::stable::contiguous(weight);
    const int64_t numel = dense.numel();
    Tensor codes = torch::stable::new_empty(dense, {divide_up(numel, 2), 1}, ScalarType::Byte);
    Tensor absmax = torch::stable::new_empty(dense, {divide_up(numel, block_size)}, ScalarType::Float);
    CudaQuantize task{dense.const_data_ptr(),          dtype, numel, 0, codes.mutable_data_ptr<uint8_t>(),
                      absmax.mutable_data_ptr<float>()};
    while (int64_t{1} << task.block_shift < block_size) ++task.block_shift;
    check_cuda(op, peftkern_cuda_nf4_quantize(&task, device.stream()));
    return {codes, absmax};
}

std::tuple<Tensor, Tensor> nf4_quantize_absmax(const Tensor& absmax, const Tensor& quant_map, const Tensor& offset) {
    constexpr const char* op = "nf4_quantize_absmax";
    const OnDevice device(op, absmax);
    const int64_t count = absmax.numel();
    const Tensor flat = matching(op, "absmax", absmax, ScalarType::Float, count, absmax);
    const Tensor map = matching(op, "quant_map", quant_map, ScalarType::Float, kNestedMapSize, absmax);
    const Tensor mean = matching(op, "offset", offset, ScalarType::Float, 1, absmax);
    Tensor bytes = torch::stable::new_empty(flat, {count}, ScalarType::Byte);
    Tensor nested = torch::stable::new_empty(flat, {divide_up(count, kNestedBlockSize)}, ScalarType::Float);
    const CudaQuantizeAbsmax task{flat.const_data_ptr<float>(),      count,
                                  map.const_data_ptr<float>(),       mean.const_data_ptr<float>(),
                                  bytes.mutable_data_ptr<uint8_t>(), nested.mutable_data_ptr<float>()};
    check_cuda(op, peftkern_cuda_nf4_quantize_absmax(&task, device.stream()));
    return {bytes, nested};
}

Tensor nf4_dequantize(const Tensors& w, const Integers& wf, ScalarType dtype) {
    constexpr const char* op = "nf4_dequantize";
    const Dtype out_dtype = element_dtype(op, "dtype", dtype);
    const OnDevice device(op, first_of(op, w));
    const Nf4Weight weight = Nf4Weight::of(op, w, wf);
    Tensor out = torch::stable::new_empty(weight.codes, {weight.out_features, weight.in_features}, dtype);
    const CudaDequantize task{weight.view, out.numel(), out.mutable_data_ptr(), out_dtype};
    check_cuda(op, peftkern_cuda_nf4_dequantize(&task, device.stream()));
    return out;
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) {
    m.impl("nf4_quantize", TORCH_BOX(&peftkern::nf4_quantize));
    m.impl("nf4_quantize_absmax", TORCH_BOX(&peftkern::nf4_quantize_absmax));
    m.impl("nf4_dequantize", TORCH_BOX(&peftkern::nf4_dequantize));
}
