// What the host functions of ops on an NF4 weight share: the task of a fused kernel, and the decode's launches.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/host.h"

namespace peftkern {

// The GEMM kernels come with every device that the build serves.
inline bool has_gemm(const DeviceTraits& traits) {
    return traits.compute_capability >= 80;
}

inline CudaLinear linear_task(const XRows& rows, const Nf4Weight& weight, int64_t out_features, int64_t in_features,
                              Tensor& y) {
    CudaLinear task = {};
    task.x = rows.tensor.const_data_ptr();
    task.x_stride = rows.stride;
    task.rows = rows.rows;
    task.in_features = in_features;
    task.out_features = out_features;
    task.dtype = rows.dtype;
    task.weight = weight.view;
    task.y = y.mutable_data_ptr();
    return task;
}

// Nothing where there is none. The tensor must outlive the task.
inline Tensor dense_bias(const char* op, const OptionalTensor& bias, int64_t out_features, const Tensor& like) {
    return bias.has_value() ? matching(op, "bias", *bias, bias->scalar_type(), out_features, like) : Tensor();
}

inline void add_bias(const char* op, CudaLinear& task, const Tensor& bias) {
    if (!bias.defined()) return;
    task.epilogue.bias = bias.const_data_ptr();
    task.epilogue.bias_dtype = element_dtype(op, "bias", bias.scalar_type());
}

inline void decode(const char* op, const OnDevice& device, const DeviceTraits& traits, CudaLinear& task,
                   const Tensor& y) {
    const DecodePlan plan = decode_plan(task.rows, task.out_features, task.in_features, traits);
    Tensor partials;
    if (plan.splits > 1) {
        partials = torch::stable::new_empty(y, {plan.splits, task.rows, task.out_features}, ScalarType::Float);
        task.partials = partials.mutable_data_ptr<float>();
    }
    task.splits = plan.splits;
    check_cuda(op, peftkern_cuda_nf4_linear_decode(&task, &plan, device.index(), device.stream()));
}

}  // namespace peftkern
