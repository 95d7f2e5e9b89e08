// The activations of a bottleneck and their slopes, for the instruction set whose Simd the including file chose.
// Errors relative to the result stay below 1e-6: exp by Cephes' polynomial, tanh beside 0 as well; the normal
// distribution's tail is a polynomial in 1 / (1 + 0.37 |z|) times exp(-z^2 / 2), fitted for the smallest relative
// error.
#pragma once

#include <stdint.h>

#include "cpu/gemm.h"
#include "cpu/panel_fp32.h"

namespace peftkern {
namespace {

struct ValueAndSlope {
    Simd::F value, slope;
};

template <class... Rest>
Simd::F polynomial(Simd::F x, float highest, Rest... rest) {
    Simd::F sum = Simd::set1(highest);
    ((sum = Simd::fmadd(sum, x, Simd::set1(rest))), ...);
    return sum;
}

inline Simd::F magnitude(Simd::F x) {
    return x < 0.0f ? -x : x;
}

// Within 2^-126 and 2^127: what is beyond counts as these.
inline Simd::F exponential(Simd::F x) {
    typedef int32_t Bits __attribute__((vector_size(sizeof(Simd::F))));
    x = x < -87.0f ? Simd::set1(-87.0f) : x;
    x = x > 88.0f ? Simd::set1(88.0f) : x;
    // x / log 2 rounded to a whole number, which then is in the low bits.
    const Simd::F shift = Simd::set1(0x1.8p23f), shifted = Simd::fmadd(x, Simd::set1(1.44269504f), shift);
    const Simd::F whole = shifted - shift;
    Simd::F r = Simd::fmadd(whole, Simd::set1(-0.693359375f), x);
    r = Simd::fmadd(whole, Simd::set1(2.12194440e-4f), r);
    const Simd::F p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                 1.6666665459e-1f, 5.0000001201e-1f);
    const Simd::F fraction = Simd::fmadd(p * r, r, r) + 1.0f;
    const Bits power = (reinterpret_cast<Bits>(shifted) << 23) + 0x3f800000;
    return fraction * reinterpret_cast<Simd::F>(power);
}

inline Simd::F sigmoid(Simd::F x) {
    return 1.0f / (1.0f + exponential(-x));
}

struct Relu {
    static ValueAndSlope at(Simd::F z) {
        const Simd::F zero = Simd::zero();
        return {z < 0.0f ? zero : z, z > 0.0f ? Simd::set1(1.0f) : zero};
    }
};

struct Gelu {
    static ValueAndSlope at(Simd::F z) {
        const Simd::F density = exponential(z * z * -0.5f);
        const Simd::F t = 1.0f / Simd::fmadd(magnitude(z), Simd::set1(0.37f), Simd::set1(1.0f));
        const Simd::F p = polynomial(t, -0.0313206433f, 0.135108058f, -0.194259529f, 0.064482815f, 0.0134220756f,
                                     0.0901790269f, 0.127164361f, 0.147615298f, 0.147608613f);
        const Simd::F tail = p * t * density, cumulative = z < 0.0f ? tail : 1.0f - tail;
        return {z * cumulative, Simd::fmadd(z * density, Simd::set1(0.398942280f), cumulative)};
    }
};

// z * sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z^3), which is z / 2 * (1 + tanh(u)).
struct GeluTanh {
    static ValueAndSlope at(Simd::F z) {
        const Simd::F square = z * z * 0.044715f;
        const Simd::F s = sigmoid(z * (square + 1.0f) * 1.59576912f);
        return {z * s, Simd::fmadd(z * s * (1.0f - s), (square * 3.0f + 1.0f) * 1.59576912f, s)};
    }
};

struct Silu {
    static ValueAndSlope at(Simd::F z) {
        const Simd::F s = sigmoid(z);
        return {z * s, Simd::fmadd(z * s, 1.0f - s, s)};
    }
};

struct Tanh {
    static ValueAndSlope at(Simd::F z) {
        const Simd::F square = z * z;
        const Simd::F p = polynomial(square, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                     1.33314422036e-1f, -3.33332819422e-1f);
        const Simd::F near = Simd::fmadd(p * square, z, z);
        const Simd::F far = 1.0f - 2.0f / (exponential(magnitude(z) * 2.0f) + 1.0f);
        const Simd::F value = magnitude(z) < 0.625f ? near : z < 0.0f ? -far : far;
        return {value, 1.0f - value * value};
    }
};

template <class Function>
void activate_elements(const Activate& pass, int64_t begin, int64_t end) {
    const Simd::F scale = Simd::set1(pass.scale);
    const int64_t bytes = element_bytes(pass.value_dtype);
    for (int64_t i = begin; i < end; i += Simd::kLanes) {
        const int64_t valid = smaller(Simd::kLanes, end - i);
        const auto load = [=](const float* p) {
            return load_elements(reinterpret_cast<const uint8_t*>(p + i), Dtype::kFloat32, valid);
        };
        const ValueAndSlope f = Function::at(load(pass.z));
        if (pass.value)
            store_elements(static_cast<uint8_t*>(pass.value) + i * bytes, pass.value_dtype, valid, f.value * scale);
        if (pass.grad)
            store_elements(reinterpret_cast<uint8_t*>(pass.grad + i), Dtype::kFloat32, valid,
                           load(pass.grad) * f.slope * scale);
    }
}

inline void activate(const Activate* pass, int64_t begin, int64_t end) {
    switch (pass->activation) {
        case Activation::kRelu:
            return activate_elements<Relu>(*pass, begin, end);
        case Activation::kGelu:
            return activate_elements<Gelu>(*pass, begin, end);
        case Activation::kGeluTanh:
            return activate_elements<GeluTanh>(*pass, begin, end);
        case Activation::kSilu:
            return activate_elements<Silu>(*pass, begin, end);
        case Activation::kTanh:
            return activate_elements<Tanh>(*pass, begin, end);
    }
}

}  // namespace
}  // namespace peftkern
