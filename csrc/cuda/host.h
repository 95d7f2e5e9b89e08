// What the host functions of CUDA ops share: checks, views, the current stream, errors. Plain C++, no CUDA header.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/check.h"
#include "common/weight_format.h"
#include "cuda/launchers.h"
#include "cuda/rows.h"

// Lives in torch's CUDA half; null in a CPU torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace peftkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A failed launch or call becomes an exception that names the op and CUDA's error.
inline void check_cuda(const char* op, int error) {
    PEFTKERN_CHECK(error == 0, op, ": CUDA error ", error, ": ", peftkern_cuda_error_text(error));
}

// Makes a tensor's device the current one as long as it lives; knows the caller's stream there.
class OnDevice {
  public:
    OnDevice(const char* op, const Tensor& tensor) : op_(op), index_(tensor.get_device_index()), guard_(index_) {
        PEFTKERN_CHECK(aoti_torch_get_current_cuda_stream, op, ": this torch has no CUDA");
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
    }
    int32_t index() const { return index_; }
    void* stream() const { return stream_; }
    DeviceTraits traits() const {
        DeviceTraits traits = {};
        check_cuda(op_, peftkern_cuda_traits(index_, &traits));
        return traits;
    }

  private:
    const char* op_;
    int32_t index_;
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};

inline int64_t divide_up(int64_t n, int64_t d) {
    return (n + d - 1) / d;
}

inline bool is_aligned(const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Dense, and on a 16-byte boundary, which a slice of a tensor need not be.
inline Tensor aligned(const Tensor& tensor) {
    const Tensor dense = torch::stable::contiguous(tensor);
    return is_aligned(dense) ? dense : torch::stable::clone(dense);
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
    PEFTKERN_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), op, ": ", name,
                   " must be on CUDA device ", like.get_device_index());
}

inline Tensor matching(const char* op, const char* name, const Tensor& tensor, ScalarType type, int64_t numel,
                       const Tensor& like) {
    check_device(op, name, tensor, like);
    check_part(op, name, tensor, type, numel);
    return torch::stable::contiguous(tensor);
}

// The bytes of an NF4 weight [out, in], checked; the tensors own what `view` points to.
struct Nf4Weight {
    Tensor codes, absmax, nested_absmax, nested_quant_map, offset;
    Nf4View view = {};
    int64_t out_features, in_features, block_size;

    bool nested() const { return view.nested_absmax != nullptr; }
    static Nf4Weight of(const char* op, const Tensors& w, const Integers& wf) {
        const WeightParts parts = weight_of(op, w, wf);
        PEFTKERN_CHECK(parts.format == kNf4Format, op, ": weight must be NF4 on CUDA, got a dense one");
        const Tensor* t = parts.tensors;
        Nf4Weight weight;
        weight.out_features = parts.out_features;
        weight.in_features = parts.in_features;
        weight.block_size = parts.block_size;
        const int64_t numel = parts.out_features * parts.in_features, blocks = divide_up(numel, parts.block_size);
        const ScalarType scale_type = parts.nested() ? ScalarType::Byte : ScalarType::Float;
        weight.codes = aligned(matching(op, "codes", t[0], ScalarType::Byte, divide_up(numel, 2), t[0]));
        weight.absmax = matching(op, "absmax", t[1], scale_type, blocks, t[0]);
        Nf4View& view = weight.view;
        view.codes = weight.codes.const_data_ptr<uint8_t>();
        view.absmax = weight.absmax.const_data_ptr();
        while (int64_t{1} << view.block_shift < parts.block_size) ++view.block_shift;
        if (!parts.nested()) return weight;
        const int64_t nested_blocks = divide_up(blocks, kNestedBlockSize);
        weight.nested_absmax = matching(op, "nested_absmax", t[2], ScalarType::Float, nested_blocks, t[0]);
        weight.nested_quant_map = matching(op, "nested_quant_map", t[3], ScalarType::Float, kNestedMapSize, t[0]);
        weight.offset = matching(op, "offset", t[4], ScalarType::Float, 1, t[0]);
        view.nested_absmax = weight.nested_absmax.const_data_ptr<float>();
        view.nested_quant_map = weight.nested_quant_map.const_data_ptr<float>();
        view.offset = weight.offset.const_data_ptr<float>();
        return weight;
    }
};

// A tensor [..., columns] as rows that kernels can read 16 bytes at a time.
struct XRows {
    Tensor tensor;  // [rows, columns]
    int64_t rows = 1, columns, stride;
    Dtype dtype;

    XRows(const char* op, const char* name, const Tensor& all) {
        PEFTKERN_CHECK(all.dim() >= 1, op, ": ", name, " must have shape [..., columns], got ", shape_text(all));
        dtype = element_dtype(op, name, all.scalar_type());
        columns = all.size(all.dim() - 1);
        for (int64_t i = 0; i + 1 < all.dim(); ++i) rows *= all.size(i);
        tensor = torch::stable::reshape(all, {rows, columns});
        const bool readable = rows_readable(rows, columns, tensor.stride(0), tensor.stride(1));
        if (!readable || !is_aligned(tensor)) tensor = aligned(tensor);
        stride = stride_of_rows(rows, columns, tensor.stride(0));
    }
};

inline std::vector<int64_t> sizes_with_columns(const Tensor& like, int64_t columns) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i + 1 < like.dim(); ++i) sizes.push_back(like.size(i));
    sizes.push_back(columns);
    return sizes;
}

}  // namespace peftkern
