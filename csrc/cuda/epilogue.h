// What a linear op adds to an fp32 sum before it is rounded once: on the device and, for tests, on the host.
#pragma once

#include "cuda/element.h"

namespace peftkern {

// y[m, n] = (sum + h_scale sum_r h[m, r] lora_b[n, r]) * row_scale[n] + bias[n]; null pointers leave their part out.
struct Epilogue {
    const void* bias;  // [out]
    Dtype bias_dtype;
    const float* row_scale;  // [out]: a factor of each row of the weight
    const float* h;          // [rows, rank]
    const void* lora_b;      // [out, rank]
    Dtype lora_b_dtype;
    int rank;
    float h_scale;
};

PEFTKERN_BOTH float finish(const Epilogue& epilogue, float sum, int64_t m, int64_t n) {
    if (epilogue.h) {
        const float* h = epilogue.h + m * epilogue.rank;
        float low_rank = 0.0f;
        for (int r = 0; r < epilogue.rank; ++r)
            low_rank += h[r] * load_element(epilogue.lora_b, epilogue.lora_b_dtype, n * epilogue.rank + r);
        sum += epilogue.h_scale * low_rank;
    }
    if (epilogue.row_scale) sum *= epilogue.row_scale[n];
    if (epilogue.bias) sum += load_element(epilogue.bias, epilogue.bias_dtype, n);
    return sum;
}

// For sums that have it already.
PEFTKERN_BOTH Epilogue without_low_rank(Epilogue epilogue) {
    epilogue.h = nullptr;
    return epilogue;
}

}  // namespace peftkern
