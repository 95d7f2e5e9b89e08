// The quantisation kernels of one instruction set. Included after its Simd (cpu/simd_*.h) and QuantizeSimd:
//     I load_bits(const void*), void store_bits(void*, I)  kLanes words
//     I abs_max32(I most, I v), uint32_t max_lane32(I)     of the bits of |x|, x fp32: ordered as |x| is, infinity and
//     NaN I abs_max16(I most, I v), uint32_t max_lane16(I)     above every number; and of bf16 or fp16, two in a lane
//     void split_bf16(const uint16_t*, F*)                 2 kLanes elements to the even ones and the odd ones
//     I nearest(F)                                         per lane the code of the nearest NF4 value
//     void pack(const I*, uint8_t* bytes)                  32 codes, one per lane, to 16 bytes
//     void pack_even_odd(const I*, uint8_t* bytes)         the same in split_bf16's order
//     I truncate(F)                                        towards zero, to int32
//     WordTable(const uint16_t* values).decode(bytes, out) 16 bytes to the values of their 32 codes
// Compiled with -ffp-contract=off: products and sums are rounded one by one, as bitsandbytes' and the reference's are.
#pragma once

#include <string.h>

#include "common/nf4_codebook.h"
#include "cpu/nf4_codes.h"
#include "cpu/quantize.h"

namespace peftkern {
namespace {

// Elements per step: they fill 16 bytes of codes, and every whole block is a number of steps.
constexpr int64_t kStep = 32;
constexpr int kStepVectors = kStep / Simd::kLanes;
static_assert(kMinBlockSize % kStep == 0, "a whole block has whole steps");

// Weights of a run of blocks stay in L1 (8 KiB of fp32) between the pass for scales and the pass for codes.
constexpr int64_t kRunElements = 2048;

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float at_least(float value, float least) {
    return value < least ? least : value;
}

// How kStep elements are loaded: load() fills kStepVectors vectors, pack() takes codes in the same order. most()
// gathers the bits of the largest |x|, absmax() is its value.
struct Fp32 {
    using Word = float;
    static void load(const float* p, Simd::F* v) {
        for (int i = 0; i < kStepVectors; ++i) v[i] = Simd::load(p + i * Simd::kLanes);
    }
    static void pack(const Simd::I* codes, uint8_t* bytes) { QuantizeSimd::pack(codes, bytes); }
    static Simd::I most(Simd::I bits, const float* p) {
        for (int i = 0; i < kStepVectors; ++i)
            bits = QuantizeSimd::abs_max32(bits, QuantizeSimd::load_bits(p + i * Simd::kLanes));
        return bits;
    }
    static float absmax(Simd::I bits) { return float_of(QuantizeSimd::max_lane32(bits)); }
};

struct Halves {
    using Word = uint16_t;
    static Simd::I most(Simd::I bits, const uint16_t* p) {
        for (int i = 0; i < kStepVectors; i += 2)
            bits = QuantizeSimd::abs_max16(bits, QuantizeSimd::load_bits(p + i * Simd::kLanes));
        return bits;
    }
};

struct Bf16 : Halves {
    static void load(const uint16_t* p, Simd::F* v) {
        for (int i = 0; i < kStepVectors; i += 2) QuantizeSimd::split_bf16(p + i * Simd::kLanes, v + i);
    }
    static void pack(const Simd::I* codes, uint8_t* bytes) { QuantizeSimd::pack_even_odd(codes, bytes); }
    static float absmax(Simd::I bits) { return float_of(QuantizeSimd::max_lane16(bits) << 16); }
    static void store(uint16_t* p, Simd::F v) { Simd::to_bf16(p, v); }
};

struct Fp16 : Halves {
    static void load(const uint16_t* p, Simd::F* v) {
        for (int i = 0; i < kStepVectors; ++i) v[i] = Simd::from_f16(p + i * Simd::kLanes);
    }
    static void pack(const Simd::I* codes, uint8_t* bytes) { QuantizeSimd::pack(codes, bytes); }
    static float absmax(Simd::I bits) {
        const uint32_t half = QuantizeSimd::max_lane16(bits);
        if (half >= 0x7c00) return float_of(half << 13 | 0x7f800000);
        return float_of(half << 13) * 0x1p112f;  // the exponents' biases differ by 112; exact, denormals included
    }
    static void store(uint16_t* p, Simd::F v) { Simd::to_f16(p, v); }
};

// Calls use(Fp32{}), use(Bf16{}) or use(Fp16{}).
template <class Use>
void with_elements(Dtype dtype, Use use) {
    switch (dtype) {
        case Dtype::kFloat32:
            return use(Fp32{});
        case Dtype::kBFloat16:
            return use(Bf16{});
        case Dtype::kFloat16:
            return use(Fp16{});
    }
}

template <class E, class Scale>
void code_step(const typename E::Word* weight, Scale scale, uint8_t* bytes) {
    Simd::F values[kStepVectors];
    Simd::I codes[kStepVectors];
    E::load(weight, values);
    for (int i = 0; i < kStepVectors; ++i) codes[i] = QuantizeSimd::nearest(scale(values[i]));
    E::pack(codes, bytes);
}

// Whole blocks: the scales of all, then the codes of all. Block by block, the chain from loads to reciprocal is exposed
// (1.25 times the time).
template <class E>
void quantize_blocks(const typename E::Word* weight, int64_t block_size, int64_t count, uint8_t* bytes, float* absmax) {
    for (int64_t block = 0; block < count; ++block) {
        Simd::I bits = {};
        for (int64_t i = 0; i < block_size; i += kStep) bits = E::most(bits, weight + block * block_size + i);
        absmax[block] = E::absmax(bits);
    }
    for (int64_t block = 0; block < count; ++block) {
        const Simd::F inverse = Simd::set1(1.0f / at_least(absmax[block], kMinAbsmax));
        const auto scale = [&](Simd::F w) { return w * inverse; };
        for (int64_t i = block * block_size; i < (block + 1) * block_size; i += kStep)
            code_step<E>(weight + i, scale, bytes + i / 2);
    }
}

// A last block cut short by the end of the weight: bitsandbytes divides here, and its absmax is never below kMinAbsmax.
template <class E>
void quantize_partial_block(const typename E::Word* weight, int64_t count, uint8_t* bytes, float* absmax) {
    typename E::Word rest[kStep] = {};
    const int64_t whole = count / kStep * kStep;
    memcpy(rest, weight + whole, static_cast<size_t>(count - whole) * sizeof(typename E::Word));
    Simd::I bits = E::most(Simd::I{}, rest);
    for (int64_t i = 0; i < whole; i += kStep) bits = E::most(bits, weight + i);
    *absmax = at_least(E::absmax(bits), kMinAbsmax);
    const Simd::F divisor = Simd::set1(*absmax);
    const auto scale = [&](Simd::F w) { return w / divisor; };
    for (int64_t i = 0; i < whole; i += kStep) code_step<E>(weight + i, scale, bytes + i / 2);
    uint8_t rest_bytes[kStep / 2];
    code_step<E>(rest, scale, rest_bytes);
    memcpy(bytes + whole / 2, rest_bytes, static_cast<size_t>(count - whole + 1) / 2);
}

void quantize(const Quantize* task, int64_t begin, int64_t end) {
    with_elements(task->dtype, [&](auto elements) {
        using E = decltype(elements);
        const auto* weight = static_cast<const typename E::Word*>(task->weight);
        const int64_t size = task->block_size, whole = task->numel / size;
        const int64_t run = kRunElements > size ? kRunElements / size : 1;
        for (int64_t block = begin; block < end && block < whole; block += run) {
            const int64_t stop = end < whole ? end : whole, count = stop - block < run ? stop - block : run;
            const int64_t first = block * size;
            quantize_blocks<E>(weight + first, size, count, task->codes + first / 2, task->absmax + block);
        }
        if (whole < end && whole * size < task->numel) {
            const int64_t first = whole * size;
            quantize_partial_block<E>(weight + first, task->numel - first, task->codes + first / 2,
                                      task->absmax + whole);
        }
    });
}

void quantize_absmax_block(const QuantizeAbsmax& task, const float* absmax, int64_t count, uint8_t* bytes,
                           float* nested_absmax) {
    alignas(64) float difference[kNestedBlockSize] = {};
    alignas(64) uint32_t grid[kNestedBlockSize];
    const Simd::F offset = Simd::set1(task.offset);
    Simd::I bits = {};
    memcpy(difference, absmax, static_cast<size_t>(count) * sizeof(float));
    for (int64_t i = 0; i < kNestedBlockSize; i += Simd::kLanes)
        Simd::store(difference + i, Simd::load(difference + i) - offset);
    for (int64_t i = count; i < kNestedBlockSize; ++i) difference[i] = 0;
    for (int64_t i = 0; i < kNestedBlockSize; i += kStep) bits = Fp32::most(bits, difference + i);
    *nested_absmax = Fp32::absmax(bits);
    if (*nested_absmax == 0) {
        memset(bytes, 0, static_cast<size_t>(count));
        return;
    }
    const Simd::F inverse = Simd::set1(1.0f / at_least(*nested_absmax, kMinNestedAbsmax)), one = Simd::set1(1.0f);
    const Simd::F half = Simd::set1(0.5f), last = Simd::set1(kGridSize - 1);
    for (int64_t i = 0; i < kNestedBlockSize; i += Simd::kLanes) {
        const Simd::F position = (Simd::load(difference + i) * inverse + one) * half * last + half;
        QuantizeSimd::store_bits(grid + i, QuantizeSimd::truncate(position));
    }
    for (int64_t i = 0; i < count; ++i) bytes[i] = task.byte_of_grid[grid[i] % kGridSize];
}

void quantize_absmax(const QuantizeAbsmax* task, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kNestedBlockSize, rest = task->count - first;
        const int64_t count = rest < kNestedBlockSize ? rest : kNestedBlockSize;
        quantize_absmax_block(*task, task->absmax + first, count, task->bytes + first, task->nested_absmax + block);
    }
}

// Decodes kStep codes of a block.
template <class E>
struct Decoder;

template <>
struct Decoder<Fp32> {
    Simd::Table table = Simd::nf4_table();
    Simd::F absmax;
    explicit Decoder(float scale) : absmax(Simd::set1(scale)) {}
    void step(const uint8_t* bytes, float* out) const {
        for (int v = 0; v < kStepVectors; ++v) {
            const Simd::I codes = Simd::row_codes(bytes + v * Simd::kLanes / 2);
            Simd::store(out + v * Simd::kLanes, Simd::lookup(table, codes) * absmax);
        }
    }
};

// 16-bit elements: the table is multiplied and rounded once per block, which gives the same bits.
template <class E>
struct ScaledTable {
    alignas(64) uint16_t words[16];
    explicit ScaledTable(float scale) {
        for (int i = 0; i < 16; i += Simd::kLanes)
            E::store(words + i, Simd::load(kNf4Codebook + i) * Simd::set1(scale));
    }
};

template <class E>
struct Decoder {
    QuantizeSimd::WordTable table;
    explicit Decoder(float scale) : table(ScaledTable<E>(scale).words) {}
    void step(const uint8_t* bytes, uint16_t* out) const { table.decode(bytes, out); }
};

template <class E>
void dequantize_block(const uint8_t* bytes, float absmax, int64_t count, typename E::Word* out) {
    const Decoder<E> decoder(absmax);
    const int64_t whole = count / kStep * kStep, rest = count - whole;
    for (int64_t i = 0; i < whole; i += kStep) decoder.step(bytes + i / 2, out + i);
    if (!rest) return;
    uint8_t rest_bytes[kStep / 2] = {};
    typename E::Word rest_out[kStep];
    memcpy(rest_bytes, bytes + whole / 2, static_cast<size_t>(rest + 1) / 2);
    decoder.step(rest_bytes, rest_out);
    memcpy(out + whole, rest_out, static_cast<size_t>(rest) * sizeof(typename E::Word));
}

void dequantize(const Dequantize* task, int64_t begin, int64_t end) {
    with_elements(task->dtype, [&](auto elements) {
        using E = decltype(elements);
        const Nf4& weight = task->weight;
        auto* out = static_cast<typename E::Word*>(task->out);
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * weight.block_size, rest = task->numel - first;
            const int64_t count = rest < weight.block_size ? rest : weight.block_size;
            dequantize_block<E>(weight.codes + first / 2, block_absmax(weight, block), count, out + first);
        }
    });
}

}  // namespace
}  // namespace peftkern
