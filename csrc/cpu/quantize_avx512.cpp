// The quantisation kernels in AVX-512 F, BW, VL and DQ.
#include "common/nf4_nearest.h"
#include "cpu/simd_avx512.h"

namespace peftkern {
namespace {

struct QuantizeSimd : Simd {
    static I load_bits(const void* p) { return _mm512_loadu_si512(p); }
    static void store_bits(void* p, I v) { _mm512_storeu_si512(p, v); }

    static I abs_max32(I most, I v) {
        return _mm512_max_epi32(most, _mm512_and_si512(v, _mm512_set1_epi32(0x7fffffff)));
    }
    static uint32_t max_lane32(I v) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
    static I abs_max16(I most, I v) { return _mm512_max_epi16(most, _mm512_and_si512(v, _mm512_set1_epi16(0x7fff))); }
    static uint32_t max_lane16(I v) {
        const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
        const __m128i m = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        // The one horizontal instruction finds a minimum: the largest is the complement of the smallest complement.
        const __m128i least = _mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi16(-1)));
        return ~static_cast<uint32_t>(_mm_cvtsi128_si32(least)) & 0xffff;
    }
    static void split_bf16(const uint16_t* p, F* even_odd) {
        const __m512i words = load_bits(p);
        even_odd[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        even_odd[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
    }

    static I nearest(F v) {
        const I cell = truncate(fmadd(v, set1(Nf4Cells::kScale), set1(Nf4Cells::kShift)));
        const F midpoint = _mm512_permutex2var_ps(load(kNf4Cells.midpoint), cell, load(kNf4Cells.midpoint + 16));
        const I code =
            _mm512_permutex2var_epi32(load_bits(kNf4Cells.first_code), cell, load_bits(kNf4Cells.first_code + 16));
        const __mmask16 above = _mm512_cmp_ps_mask(v, midpoint, _CMP_GT_OQ);
        return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
    }
    static I truncate(F v) { return _mm512_cvttps_epi32(v); }

    static void pack(const I* codes, uint8_t* bytes) {
        const __m512i words = _mm512_packus_epi32(codes[0], codes[1]);
        const __m128i pairs = _mm512_cvtepi32_epi8(_mm512_madd_epi16(words, _mm512_set1_epi32(0x00010010)));
        // Bytes 4q and 4q + 1 are quarter q of the first vector, the next two of the second.
        const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm_shuffle_epi8(pairs, order));
    }
    static void pack_even_odd(const I* codes, uint8_t* bytes) {
        const __m512i pairs = _mm512_or_si512(_mm512_slli_epi32(codes[0], 4), codes[1]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(pairs));
    }

    // 16 words, twice: a permutation reads five bits.
    struct WordTable {
        __m512i words;
        explicit WordTable(const uint16_t* values)
            : words(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)))) {}
        void decode(const uint8_t* bytes, uint16_t* out) const {
            const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
            const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, words));
        }
    };
};

}  // namespace
}  // namespace peftkern

#include "cpu/quantize_kernel.h"

namespace peftkern {
const QuantizeKernels peftkern_quantize_avx512 = {quantize, quantize_absmax, dequantize};
}  // namespace peftkern
