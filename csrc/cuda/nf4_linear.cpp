// nf4_linear for CUDA tensors: y = x W^T + bias, and dx = dy W. Formula and reference: peftkern/ops/nf4_linear.py.
#include <torch/csrc/stable/library.h>

#include "cuda/dense.h"
#include "cuda/nf4_gemm.h"
#include "cuda/nf4_linear.h"

namespace peftkern {
namespace {

Tensor dequantized(const char* op, const OnDevice& device, const Nf4Weight& weight, const Tensor& like, Dtype dtype,
                   int64_t out_features, int64_t in_features) {
    Tensor dense = torch::stable::new_empty(like, {out_features, in_features}, like.scalar_type());
    const CudaDequantize task{weight.view, out_features * in_features, dense.mutable_data_ptr(), dtype};
    check_cuda(op, peftkern_cuda_nf4_dequantize(&task, device.stream()));
    return dense;
}

void gemm(const char* op, const OnDevice& device, const DeviceTraits& traits, bool backward, const CudaLinear& task,
          const Tensor& y) {
    CudaGemm gemm = {task, gemm_plan(traits, backward, task.rows, task.out_features, task.in_features)};
    gemm.linear.splits = gemm.plan.slices;
    Tensor partials;
    if (gemm.plan.slices > 1) {
        partials = torch::stable::new_empty(y, {gemm.plan.slices, y.numel()}, ScalarType::Float);
        gemm.linear.partials = partials.mutable_data_ptr<float>();
    }
    check_cuda(op, launch_gemm(gemm, backward, traits, device.index(), device.stream()));
}

Tensor nf4_linear(const Tensor& x, const Tensors& w, const Integers& wf, const OptionalTensor& bias) {
    constexpr const char* op = "nf4_linear";
    check_device(op, "x", x, first_of(op, w));
    const OnDevice device(op, x);
    const XRows rows(op, "x", x);
    const Nf4Weight weight = Nf4Weight::of(op, w, wf);
    check_features(op, "x", x, weight.in_features);
    const int64_t out_features = weight.out_features;
    const Tensor own_bias = dense_bias(op, bias, out_features, weight.codes);

    const DeviceTraits traits = device.traits();
    const LinearCall call{rows.rows,         out_features,    rows.columns, rows.dtype,
                          weight.block_size, weight.nested(), false,        has_gemm(traits)};
    const LinearKernel kernel = choose_kernel(call, traits);
    if (kernel == LinearKernel::kDense) {
        const Tensor dense = dequantized(op, device, weight, x, rows.dtype, out_features, rows.columns);
        const std::vector<int64_t> sizes = sizes_with_columns(x, out_features);
        if (bias.has_value())
            return torch::stable::reshape(linear_of(rows.tensor, dense, torch::stable::to(own_bias, x.scalar_type())),
                                          sizes);
        Tensor y = torch::stable::new_empty(x, {rows.rows, out_features}, x.scalar_type());
        matmul_into(y, rows.tensor, torch::stable::transpose(dense, 0, 1));
        return torch::stable::reshape(y, sizes);
    }
    Tensor y = torch::stable::new_empty(x, sizes_with_columns(x, out_features), x.scalar_type());
    CudaLinear task = linear_task(rows, weight, out_features, rows.columns, y);
    add_bias(op, task, own_bias);
    if (kernel == LinearKernel::kDecode)
        decode(op, device, traits, task, y);
    else
        gemm(op, device, traits, false, task, y);
    return y;
}

Tensor nf4_linear_backward(const Tensor& grad_y, const Tensors& w, const Integers& wf) {
    constexpr const char* op = "nf4_linear_backward";
    check_device(op, "grad_y", grad_y, first_of(op, w));
    const OnDevice device(op, grad_y);
    const XRows rows(op, "grad_y", grad_y);
    const Nf4Weight weight = Nf4Weight::of(op, w, wf);
    check_features(op, "grad_y", grad_y, weight.out_features);
    const int64_t in_features = weight.in_features;
    const DeviceTraits traits = device.traits();
    const LinearCall call{rows.rows,         rows.columns,    in_features, rows.dtype,
                          weight.block_size, weight.nested(), true,        has_gemm(traits)};
    if (choose_kernel(call, traits) == LinearKernel::kGemm) {
        Tensor grad_x = torch::stable::new_empty(grad_y, sizes_with_columns(grad_y, in_features), grad_y.scalar_type());
        gemm(op, device, traits, true, linear_task(rows, weight, rows.columns, in_features, grad_x), grad_x);
        return grad_x;
    }
    const Tensor dense = dequantized(op, device, weight, grad_y, rows.dtype, rows.columns, in_features);
    Tensor grad_x = torch::stable::new_empty(grad_y, {rows.rows, in_features}, grad_y.scalar_type());
    matmul_into(grad_x, rows.tensor, dense);
    return torch::stable::reshape(grad_x, sizes_with_columns(grad_y, in_features));
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) {
    m.impl("nf4_linear", TORCH_BOX(&peftkern::nf4_linear));
    m.impl("nf4_linear_backward", TORCH_BOX(&peftkern::nf4_linear_backward));
}
