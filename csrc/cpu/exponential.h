// e^x and 2^x for the instruction set whose Simd the including file chose: Cephes' polynomials, within 2 ulp.
#pragma once

#include <stdint.h>

namespace peftkern {
namespace {

template <class... Rest>
Simd::F polynomial(Simd::F x, float highest, Rest... rest) {
    Simd::F sum = Simd::set1(highest);
    ((sum = Simd::fmadd(sum, x, Simd::set1(rest))), ...);
    return sum;
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

// 2^x for x <= 0, of which anything below 2^-126 is 0; NaN stays.
inline Simd::F power_of_two(Simd::F x) {
    typedef int32_t Bits __attribute__((vector_size(sizeof(Simd::F))));
    // x rounded to a whole number, which then is in the low bits.
    const Simd::F shift = Simd::set1(0x1.8p23f), shifted = x + shift, r = x - (shifted - shift);
    const Simd::F p = polynomial(r, 1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                                 5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f);
    const Bits power = reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23);
    return x < Simd::set1(-126.0f) ? Simd::zero() : reinterpret_cast<Simd::F>(power);
}

}  // namespace
}  // namespace peftkern
