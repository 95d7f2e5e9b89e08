// The quantisation kernels on any CPU.
#include "common/nf4_nearest.h"
#include "cpu/simd_portable.h"

namespace peftkern {
namespace {

struct QuantizeSimd : Simd {
    static I load_bits(const void* p) {
        I v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static void store_bits(void* p, I v) { memcpy(p, &v, sizeof v); }

    static I abs_max32(I most, I v) {
        const I bits = v & 0x7fffffffu;
        return most > bits ? most : bits;
    }
    static uint32_t max_lane32(I v) {
        uint32_t result = v[0];
        for (int i = 1; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
        return result;
    }
    // Only the low half of a lane of `most` is in use.
    static I abs_max16(I most, I v) { return abs_max32(abs_max32(most, v & 0x7fffu), v >> 16 & 0x7fffu); }
    static uint32_t max_lane16(I v) { return max_lane32(v); }
    static void split_bf16(const uint16_t* p, F* even_odd) {
        const I words = load_bits(p);
        even_odd[0] = reinterpret_cast<F>(words << 16);
        even_odd[1] = reinterpret_cast<F>(words & 0xffff0000u);
    }

    static I nearest(F v) {
        const I cells = truncate(v * Nf4Cells::kScale + Nf4Cells::kShift) & 31u;
        I codes;
        for (int i = 0; i < kLanes; ++i) {
            const uint32_t cell = cells[i];
            codes[i] = static_cast<uint32_t>(kNf4Cells.first_code[cell] + (v[i] > kNf4Cells.midpoint[cell]));
        }
        return codes;
    }
    static I truncate(F v) { return reinterpret_cast<I>(__builtin_convertvector(v, Signed)); }

    static void pack(const I* codes, uint8_t* bytes) {
        for (int i = 0; i < 16; ++i) {
            const I v = codes[2 * i / kLanes];
            bytes[i] = static_cast<uint8_t>(v[2 * i % kLanes] << 4 | v[2 * i % kLanes + 1]);
        }
    }
    static void pack_even_odd(const I* codes, uint8_t* bytes) {
        for (int i = 0; i < 2; ++i) {
            const I pairs = codes[2 * i] << 4 | codes[2 * i + 1];
            for (int lane = 0; lane < kLanes; ++lane) bytes[i * kLanes + lane] = static_cast<uint8_t>(pairs[lane]);
        }
    }

    struct WordTable {
        uint16_t words[16];
        explicit WordTable(const uint16_t* values) { memcpy(words, values, sizeof words); }
        void decode(const uint8_t* bytes, uint16_t* out) const {
            for (int i = 0; i < 16; ++i) {
                out[2 * i] = words[bytes[i] >> 4];
                out[2 * i + 1] = words[bytes[i] & 15];
            }
        }
    };
};

}  // namespace
}  // namespace peftkern

#include "cpu/quantize_kernel.h"

namespace peftkern {
const QuantizeKernels peftkern_quantize_scalar = {quantize, quantize_absmax, dequantize};
}  // namespace peftkern
