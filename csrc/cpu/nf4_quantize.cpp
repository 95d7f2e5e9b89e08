// nf4_quantize and nf4_quantize_absmax on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/quantize_host.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, int64_t block_size) {
    constexpr const char* op = "nf4_quantize";
    const Dtype dtype = element_dtype(op, "weight", weight.scalar_type());
    check_block_size(op, block_size);
    const QuantizeKernels& kernels = quantize_kernels(op);

    const Tensor dense = torch::stable::contiguous(weight);
    const int64_t numel = dense.numel(), blocks = ceil_divide(numel, block_size);
    Tensor codes = torch::stable::empty({ceil_divide(numel, 2), 1}, ScalarType::Byte);
    Tensor absmax = torch::stable::empty({blocks}, ScalarType::Float);
    const Quantize task{dense.const_data_ptr(),          dtype, numel, block_size, codes.mutable_data_ptr<uint8_t>(),
                        absmax.mutable_data_ptr<float>()};
    torch::stable::parallel_for(0, blocks, blocks_per_thread(block_size),
                                [&](int64_t begin, int64_t end) { kernels.quantize(&task, begin, end); });
    return {codes, absmax};
}

float grid_value(int64_t i) {
    return -1.0f + static_cast<float>(2 * i) / static_cast<float>(kGridSize - 1);
}

// The index of the nearest of the ascending `map` to each grid point, ties to the lower index.
std::vector<uint8_t> nearest_of_grid(const float* map) {
    std::vector<uint8_t> nearest(kGridSize);
    int64_t begin = 0;
    for (int64_t byte = 0; byte < kNestedMapSize; ++byte) {
        int64_t end = kGridSize;
        if (byte + 1 < kNestedMapSize) {
            const float midpoint = 0.5f * (map[byte] + map[byte + 1]);
            int64_t low = begin;
            while (low < end) {
                const int64_t middle = (low + end) / 2;
                if (grid_value(middle) <= midpoint) {
                    low = middle + 1;
                } else {
                    end = middle;
                }
            }
        }
        std::memset(nearest.data() + begin, static_cast<int>(byte), static_cast<size_t>(end - begin));
        begin = end;
    }
    return nearest;
}

std::tuple<Tensor, Tensor> nf4_quantize_absmax(const Tensor& absmax, const Tensor& quant_map, const Tensor& offset) {
    constexpr const char* op = "nf4_quantize_absmax";
    const int64_t count = absmax.numel(), blocks = ceil_divide(count, kNestedBlockSize);
    check_part(op, "absmax", absmax, ScalarType::Float, count);
    check_part(op, "quant_map", quant_map, ScalarType::Float, kNestedMapSize);
    check_part(op, "offset", offset, ScalarType::Float, 1);
    const QuantizeKernels& kernels = quantize_kernels(op);

    const Tensor flat = torch::stable::contiguous(absmax), map = torch::stable::contiguous(quant_map);
    Tensor bytes = torch::stable::empty({count}, ScalarType::Byte);
    Tensor nested_absmax = torch::stable::empty({blocks}, ScalarType::Float);
    const std::vector<uint8_t> byte_of_grid = nearest_of_grid(map.const_data_ptr<float>());
    const QuantizeAbsmax task{flat.const_data_ptr<float>(),      count,
                              *offset.const_data_ptr<float>(),   byte_of_grid.data(),
                              bytes.mutable_data_ptr<uint8_t>(), nested_absmax.mutable_data_ptr<float>()};
    torch::stable::parallel_for(0, blocks, blocks_per_thread(kNestedBlockSize),
                                [&](int64_t begin, int64_t end) { kernels.quantize_absmax(&task, begin, end); });
    return {bytes, nested_absmax};
}

}  // namespace
}  // namespace peftkern

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
    m.impl("nf4_quantize", TORCH_BOX(&peftkern::nf4_quantize));
    m.impl("nf4_quantize_absmax", TORCH_BOX(&peftkern::nf4_quantize_absmax));
}
