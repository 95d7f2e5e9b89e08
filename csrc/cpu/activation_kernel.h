// Activations and their slopes, alone and as gates, for the instruction set whose Simd the including file chose.
// Errors relative to the result stay below 1e-6: exp by Cephes' polynomial, tanh beside 0 as well; the normal
// distribution's tail is a polynomial in 1 / (1 + 0.37 |z|) times exp(-z^2 / 2), fitted for the smallest relative
// error.
#pragma once

#include <stdint.h>

#include "cpu/exponential.h"
#include "cpu/gemm.h"
#include "cpu/panel_fp32.h"

namespace peftkern {
namespace {

struct ValueAndSlope {
    Simd::F value, slope;
};

inline Simd::F magnitude(Simd::F x) {
    return x < 0.0f ? -x : x;
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
        // Beyond this the sigmoid is 0 or 1, and the cube may not be finite.
        const Simd::F limit = Simd::set1(30.0f), c = z < -limit ? -limit : z > limit ? limit : z;
        const Simd::F square = c * c * 0.044715f;
        const Simd::F s = sigmoid(c * (square + 1.0f) * 1.59576912f);
        return {z * s, Simd::fmadd(c * s * (1.0f - s), (square * 3.0f + 1.0f) * 1.59576912f, s)};
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

template <class Function>
void gate_elements(const GatedActivation& pass, int64_t begin, int64_t end) {
    const int64_t bytes = element_bytes(pass.dtype);
    const auto at = [&](const void* p, int64_t i) { return static_cast<const uint8_t*>(p) + i * bytes; };
    for (int64_t i = begin; i < end; i += Simd::kLanes) {
        const int64_t count = smaller(Simd::kLanes, end - i);
        const auto load = [&](const void* p) { return load_elements(at(p, i), pass.dtype, count); };
        const auto store = [&](void* p, Simd::F value) {
            if (p) store_elements(static_cast<uint8_t*>(p) + i * bytes, pass.dtype, count, value);
        };
        const Simd::F up = load(pass.up);
        const ValueAndSlope gate = Function::at(load(pass.gate));
        if (pass.grad) {
            const Simd::F grad = load(pass.grad);
            store(pass.grad_gate, grad * up * gate.slope);
            store(pass.grad_up, grad * gate.value);
        }
        store(pass.product, gate.value * up);
    }
}

// Calls use(Function) with the activation's struct.
template <class Use>
void with_activation(Activation activation, Use use) {
    switch (activation) {
        case Activation::kRelu:
            return use(Relu());
        case Activation::kGelu:
            return use(Gelu());
        case Activation::kGeluTanh:
            return use(GeluTanh());
        case Activation::kSilu:
            return use(Silu());
        case Activation::kTanh:
            return use(Tanh());
    }
}

inline void activate(const Activate* pass, int64_t begin, int64_t end) {
    with_activation(pass->activation, [=](auto function) { activate_elements<decltype(function)>(*pass, begin, end); });
}

inline void gated_activation(const GatedActivation* pass, int64_t begin, int64_t end) {
    with_activation(pass->activation, [=](auto function) { gate_elements<decltype(function)>(*pass, begin, end); });
}

}  // namespace
}  // namespace peftkern
