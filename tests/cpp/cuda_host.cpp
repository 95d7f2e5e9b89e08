// What tests ask of the CUDA kernels' host and device functions.
#include <cuda_runtime.h>

#include "cuda/dispatch.h"
#include "cuda/nf4_decode_maps.h"
#include "cuda/nf4_maps.h"
#include "cuda/rows.h"

using namespace peftkern;

namespace {

template <Dtype kDtype>
void fill(unsigned char* table, bool wide) {
    if (wide)
        fill_pair32(table, 0, 1);
    else
        fill_pair16<kDtype>(table, 0, 1);
}

}  // namespace

extern "C" {

DecodePlan host_decode_plan(int64_t rows, int64_t out_features, int64_t in_features, DeviceTraits device) {
    return decode_plan(rows, out_features, in_features, device);
}

int host_choose_kernel(LinearCall call, DeviceTraits device) {
    return static_cast<int>(choose_kernel(call, device));
}

GemmPlan host_gemm_plan(LinearCall call, DeviceTraits device) {
    return gemm_plan(device, call.backward, call.rows, call.out_features, call.in_features);
}

// The stride that kernels are told of rows that they read where they lie; 0: x must be copied.
int64_t host_row_stride(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    const bool readable = rows_readable(rows, columns, row_stride, column_stride);
    return readable ? stride_of_rows(rows, columns, row_stride) : 0;
}

void host_set_device(int device) {
    cudaSetDevice(device);
}

bool host_last_was_programmatic() {
    return emulation::last_was_programmatic;
}

uint32_t host_pair_address(uint32_t word, int i, int lane, int entry_bytes) {
    return pair_address(word, i, entry_bytes == 4 ? pair_lane_offset<4>(lane) : pair_lane_offset<8>(lane));
}

void host_pair_table(unsigned char* table, int dtype, bool wide) {
    dtype == 1 ? fill<Dtype::kBFloat16>(table, wide) : fill<Dtype::kFloat16>(table, wide);
}

uint32_t host_lane_table_address(uint32_t word, int e, int lane) {
    return lane_table_address(word, e, static_cast<uint32_t>(4 * lane));
}

float host_nested_scale(float map_value, float nested_absmax, float offset) {
    return nested_scale(map_value, nested_absmax, offset);
}

void host_nearest_codes(const float* values, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
        const int cell = nearest_cell(values[i]);
        const uint32_t first = nf4_tables().cell_code[cell];
        codes[i] = static_cast<uint8_t>(code_in_cell(values[i], nf4_tables().cell_midpoint[cell], first));
    }
}

void host_convert(const void* values, int64_t count, int from, int to, void* out) {
    for (int64_t i = 0; i < count; ++i)
        store_element(out, static_cast<Dtype>(to), i, load_element(values, static_cast<Dtype>(from), i));
}

double host_unscale(int dtype) {
    return dtype == 1 ? pair16_unscale<Dtype::kBFloat16>() : pair16_unscale<Dtype::kFloat16>();
}

}  // extern "C"
