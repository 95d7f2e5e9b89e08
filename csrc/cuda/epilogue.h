// What a linear op adds to an fp32 sum before it is rounded once: on the device and, for tests, on the host.
#pragma once

#include "cuda/element.h"

namespace peftkern {

// y[m, n] = (sum + sum_r h[m, r] lora_b[n, r]) * row_scale[n] + bias[n]; null pointers leave their part out.
struct Epilogue {
    const void* bias;  // [out]
    Dtype bias_dtype;
    const float* row_scale;  // [out]: a factor of each row of the weight
    const float* h;          // [rows, rank], the adapter's scaling included
    const void* lora_b;      // [out, rank]
    Dtype lora_b_dtype;
    int rank;
};

PEFTKERN_BOTH float finish(const Epilogue& epilogue, float sum, int64_t m, int64_t n) {
    if (epilogue.h) {
        const float* h = epilogue.h + m * epilogue.rank;
        for (int r = 0; r < epilogue.rank; ++r)
            sum += h[r] * load_element(epilogue.lora_b, epilogue.lora_b_dtype, n * epilogue.rank + r);
    }
    if (epilogue.row_scale) sum *= epilogue.row_scale[n];
    if (epilogue.bias) sum += load_element(epilogue.bias, epilogue.bias_dtype, n);
    return sum;
}

}  // namespace peftkern
