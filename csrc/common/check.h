// Argument checks of the host functions: before any work, naming op, argument, what was wanted and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/nf4_format.h"

// torch's STD_TORCH_CHECK begins its text with the path of the file on the machine that compiled it.
#define PEFTKERN_CHECK(condition, ...) \
    if (!(condition)) throw std::runtime_error(::peftkern::joined(__VA_ARGS__))

namespace peftkern {

template <class... Parts>
std::string joined(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

inline std::string shape_text(const torch::stable::Tensor& tensor) {
    std::string text = "[";
    for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + "]";
}

inline void check_dtype(const char* op, const char* name, const torch::stable::Tensor& tensor, bool right,
                        const char* wanted) {
    PEFTKERN_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
    PEFTKERN_CHECK(right, op, ": ", name, " must be ", wanted, ", got ",
                   torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_shape(const char* op, const char* name, const torch::stable::Tensor& tensor, bool right,
                        const std::string& wanted) {
    PEFTKERN_CHECK(right, op, ": ", name, " must have shape ", wanted, ", got ", shape_text(tensor));
}

inline void check_part(const char* op, const char* name, const torch::stable::Tensor& part,
                       torch::headeronly::ScalarType dtype, int64_t numel) {
    PEFTKERN_CHECK(part.scalar_type() == dtype && part.numel() == numel, op, ": ", name, " must be ",
                   torch::headeronly::toString(dtype), " with ", numel, " elements, got ",
                   torch::headeronly::toString(part.scalar_type()), " with ", part.numel());
}

inline Dtype element_dtype(const char* op, const char* name, torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    PEFTKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ",
                   name, " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
    if (dtype == ScalarType::BFloat16) return Dtype::kBFloat16;
    return dtype == ScalarType::Half ? Dtype::kFloat16 : Dtype::kFloat32;
}

inline void check_block_size(const char* op, int64_t block_size) {
    const bool power_of_two = block_size > 0 && (block_size & (block_size - 1)) == 0;
    PEFTKERN_CHECK(power_of_two && block_size >= kMinBlockSize && block_size <= kMaxBlockSize, op,
                   ": block_size must be a power of two from ", kMinBlockSize, " to ", kMaxBlockSize, ", got ",
                   block_size);
}

}  // namespace peftkern
