// act(gate) * up and its gradients, for the instruction set whose Simd the including file chose.
#pragma once

#include <stdint.h>

#include "cpu/gemm.h"
#include "cpu/panel_fp32.h"

namespace peftkern {
namespace {

typedef uint32_t Bits __attribute__((vector_size(sizeof(Simd::F))));

inline Simd::F clamp(Simd::F x, float low, float high) {
    const Simd::F l = Simd::set1(low), h = Simd::set1(high);
    x = x < l ? l : x;
    return x > h ? h : x;
}

// Horner's scheme from its first coefficient, p, on.
template <int N>
Simd::F horner(Simd::F p, Simd::F x, const float (&coefficients)[N]) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p = Simd::fmadd(p, x, Simd::set1(coefficients[i]));
    return p;
}

constexpr float kExp[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
constexpr float kErf[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};

// Within 2 ulp; 0 below -87.7 and infinite above 88.4.
inline Simd::F exp(Simd::F x) {
    const Simd::F one = Simd::set1(1.0f);
    x = clamp(x, -88.0f, 89.0f);
    // x = n ln 2 + r; adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits.
    const Simd::F magic = Simd::set1(12582912.0f), shifted = Simd::fmadd(x, Simd::set1(1.44269504f), magic);
    const Simd::F n = shifted - magic;
    // ln 2 in two parts, the first exact in products with n.
    const Simd::F r = Simd::fmadd(n, Simd::set1(2.12194440e-4f), Simd::fmadd(n, Simd::set1(-0.693359375f), x));
    const Simd::F p = Simd::fmadd(horner(Simd::set1(1.9875691500e-4f), r, kExp), r * r, r) + one;
    const Bits power = (reinterpret_cast<Bits>(shifted) << 23) + reinterpret_cast<Bits>(one);  // 2^n
    return p * reinterpret_cast<Simd::F>(power);
}

inline Simd::F sigmoid(Simd::F x) {
    const Simd::F one = Simd::set1(1.0f);
    return one / (one + exp(Simd::zero() - x));
}

// act(x) and its derivative.
struct Activated {
    Simd::F value, slope;
};

struct Silu {
    static Activated of(Simd::F x) {
        const Simd::F s = sigmoid(x), value = x * s;
        return {value, Simd::fmadd(value, Simd::set1(1.0f) - s, s)};
    }
};

// x Phi(x), with erf by Abramowitz and Stegun 7.1.26: within 2e-7.
struct Gelu {
    static Activated of(Simd::F x) {
        const Simd::F z = clamp(x, -30.0f, 30.0f), one = Simd::set1(1.0f);
        const Simd::F bell = exp(z * z * Simd::set1(-0.5f));
        const Simd::F size = z < Simd::zero() ? Simd::zero() - z : z;
        const Simd::F t = one / Simd::fmadd(size, Simd::set1(0.3275911f * 0.70710678f), one);
        const Simd::F tail = Simd::set1(0.5f) * horner(Simd::set1(1.061405429f), t, kErf) * t * bell;
        const Simd::F phi = z < Simd::zero() ? tail : one - tail;
        return {x * phi, Simd::fmadd(z * Simd::set1(0.39894228f), bell, phi)};
    }
};

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), with (1 + tanh(u)) / 2 = sigmoid(2 u).
struct GeluTanh {
    static Activated of(Simd::F x) {
        // Beyond these bounds the sigmoid is 0 or 1, and the cube may not be finite.
        const Simd::F z = clamp(x, -30.0f, 30.0f), one = Simd::set1(1.0f);
        const Simd::F twice = Simd::set1(1.59576912f), cube = Simd::set1(0.044715f), square = z * z;
        const Simd::F s = sigmoid(twice * z * Simd::fmadd(cube, square, one));
        const Simd::F inner = twice * Simd::fmadd(Simd::set1(3.0f) * cube, square, one);
        return {x * s, Simd::fmadd(z * s * (one - s), inner, s)};
    }
};

template <class Act>
void gated_activation_of(const GatedActivation& pass, int64_t begin, int64_t end) {
    const int64_t bytes = element_bytes(pass.dtype);
    const auto at = [&](const void* p, int64_t i) { return static_cast<const uint8_t*>(p) + i * bytes; };
    for (int64_t i = begin; i < end; i += Simd::kLanes) {
        const int64_t count = smaller(Simd::kLanes, end - i);
        const auto load = [&](const void* p) { return load_elements(at(p, i), pass.dtype, count); };
        const auto store = [&](void* p, Simd::F value) {
            if (p) store_elements(static_cast<uint8_t*>(p) + i * bytes, pass.dtype, count, value);
        };
        const Simd::F up = load(pass.up);
        const Activated gate = Act::of(load(pass.gate));
        if (pass.grad) {
            const Simd::F grad = load(pass.grad);
            store(pass.grad_gate, grad * up * gate.slope);
            store(pass.grad_up, grad * gate.value);
        }
        store(pass.product, gate.value * up);
    }
}

inline void gated_activation(const GatedActivation* pass, int64_t begin, int64_t end) {
    switch (pass->activation) {
        case Activation::kSilu:
            return gated_activation_of<Silu>(*pass, begin, end);
        case Activation::kGelu:
            return gated_activation_of<Gelu>(*pass, begin, end);
        case Activation::kGeluTanh:
            return gated_activation_of<GeluTanh>(*pass, begin, end);
    }
}

}  // namespace
}  // namespace peftkern
