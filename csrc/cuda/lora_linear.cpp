// lora_linear for CUDA tensors: 1 to 8 rows on an NF4 weight, as h = x A^T and a decode that adds scaling * h B^T
// before it rounds. Formula and reference: peftkern/ops/lora_linear.py, which also has the backward for CUDA tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/nf4_linear.h"

namespace peftkern {
namespace {

// lora_a or lora_b, whose first elements lie on a 16-byte boundary.
Tensor factor(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const XRows& x,
              const Tensor& like) {
    check_device(op, name, tensor, like);
    check_shape(op, name, tensor, tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
                "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
    const Dtype dtype = element_dtype(op, name, tensor.scalar_type());
    PEFTKERN_CHECK(dtype == Dtype::kFloat32 || dtype == x.dtype, op, ": ", name, " must be float32 or x's ",
                   torch::headeronly::toString(x.tensor.scalar_type()), ", got ",
                   torch::headeronly::toString(tensor.scalar_type()));
    return aligned(tensor);
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensors& w, const Integers& wf, const Tensor& lora_a,
                                       const Tensor& lora_b, double scaling, const OptionalTensor& bias,
                                       double dropout_p, const OptionalTensor&) {
    constexpr const char* op = "lora_linear";
    PEFTKERN_CHECK(dropout_p == 0, op, ": dropout_p must be 0 on CUDA, got ", dropout_p);
    const Tensor& weight = first_of(op, w);
    check_device(op, "x", x, weight);
    const OnDevice device(op, x);
    const XRows rows(op, "x", x);
    const Nf4Weight base = Nf4Weight::of(op, w, wf);
    check_features(op, "x", x, base.in_features);
    const int64_t out_features = base.out_features;
    const DeviceTraits traits = device.traits();
    const LinearCall call{rows.rows,       out_features,  rows.columns, rows.dtype,
                          base.block_size, base.nested(), false,        has_gemm(traits)};
    PEFTKERN_CHECK(choose_kernel(call, traits) == LinearKernel::kDecode, op,
                   ": x must have at most 8 rows, in bfloat16 or float16, of whole blocks of at least 64 on CUDA, got ",
                   shape_text(x), " in ", torch::headeronly::toString(x.scalar_type()), " and blocks of ",
                   base.block_size);
    const int64_t rank = lora_a.dim() == 2 ? lora_a.size(0) : 0;
    const Tensor a = factor(op, "lora_a", lora_a, rank, rows.columns, rows, weight);
    const Tensor b = factor(op, "lora_b", lora_b, out_features, rank, rows, weight);
    const Tensor own_bias = dense_bias(op, bias, out_features, weight);

    Tensor h = torch::stable::new_empty(x, {rows.rows, rank}, ScalarType::Float);
    Tensor y = torch::stable::new_empty(x, sizes_with_columns(x, out_features), x.scalar_type());
    CudaLinear task = linear_task(rows, base, out_features, rows.columns, y);
    add_bias(op, task, own_bias);
    if (rank > 0) {
        const CudaLoraDown down{task.x,
                                task.x_stride,
                                task.rows,
                                task.in_features,
                                task.dtype,
                                a.const_data_ptr(),
                                element_dtype(op, "lora_a", a.scalar_type()),
                                static_cast<int>(rank),
                                h.mutable_data_ptr<float>()};
        check_cuda(op, peftkern_cuda_lora_down(&down, device.stream()));
        task.epilogue.h = h.const_data_ptr<float>();
        task.epilogue.lora_b = b.const_data_ptr();
        task.epilogue.lora_b_dtype = element_dtype(op, "lora_b", b.scalar_type());
        task.epilogue.rank = static_cast<int>(rank);
        task.epilogue.h_scale = static_cast<float>(scaling);
    }
    decode(op, device, traits, task, y);
    return {y, h};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) {
    m.impl("lora_linear", TORCH_BOX(&peftkern::lora_linear));
}
