// fp32, bf16 and fp16 elements behind untyped pointers, on the device and, for tests, on the host.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/dtype.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PEFTKERN_BOTH __host__ __device__ __forceinline__
#else
#define PEFTKERN_BOTH inline
#endif

namespace peftkern {

PEFTKERN_BOTH float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PEFTKERN_BOTH uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

PEFTKERN_BOTH float float_of_bf16(uint16_t bits) {
    return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

PEFTKERN_BOTH float float_of_fp16(uint16_t bits) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000 | magnitude << 13);
    // The exponents' biases differ by 112; exact, denormals included.
    return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
#endif
}

// Rounded to nearest, ties to even.
PEFTKERN_BOTH uint16_t bf16_of_float(float value) {
#ifdef __CUDA_ARCH__
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

PEFTKERN_BOTH uint16_t fp16_of_float(float value) {
#ifdef __CUDA_ARCH__
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520, half way to 65536
    if (magnitude < 0x38800000)  // below 2^-14: adding 0.5 puts the denormal's units where fp32 rounds
        return static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000));
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
#endif
}

template <Dtype kDtype>
PEFTKERN_BOTH float float_of_half(uint16_t bits) {
    static_assert(kDtype != Dtype::kFloat32, "16-bit types only");
    return kDtype == Dtype::kBFloat16 ? float_of_bf16(bits) : float_of_fp16(bits);
}

template <Dtype kDtype>
PEFTKERN_BOTH uint16_t half_of_float(float value) {
    static_assert(kDtype != Dtype::kFloat32, "16-bit types only");
    return kDtype == Dtype::kBFloat16 ? bf16_of_float(value) : fp16_of_float(value);
}

// Two values rounded to a register: `low` in the low half.
template <Dtype kDtype>
PEFTKERN_BOTH uint32_t pack_halves(float low, float high) {
#ifdef __CUDA_ARCH__
    if (kDtype == Dtype::kBFloat16) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return half_of_float<kDtype>(low) | static_cast<uint32_t>(half_of_float<kDtype>(high)) << 16;
#endif
}

PEFTKERN_BOTH float load_element(const void* data, Dtype dtype, int64_t i) {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return dtype == Dtype::kBFloat16 ? float_of_bf16(bits) : float_of_fp16(bits);
}

PEFTKERN_BOTH void store_element(void* data, Dtype dtype, int64_t i, float value) {
    if (dtype == Dtype::kFloat32)
        static_cast<float*>(data)[i] = value;
    else
        static_cast<uint16_t*>(data)[i] = dtype == Dtype::kBFloat16 ? bf16_of_float(value) : fp16_of_float(value);
}

}  // namespace peftkern
