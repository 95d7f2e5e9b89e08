// The quantisation kernels in AVX2 and F16C.
#include "common/nf4_nearest.h"
#include "cpu/simd_avx2.h"

namespace peftkern {
namespace {

struct QuantizeSimd : Simd {
    static I load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void store_bits(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

    static I abs_max32(I most, I v) {
        return _mm256_max_epi32(most, _mm256_and_si256(v, _mm256_set1_epi32(0x7fffffff)));
    }
    static uint32_t max_lane32(I v) {
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
    }
    static I abs_max16(I most, I v) { return _mm256_max_epi16(most, _mm256_and_si256(v, _mm256_set1_epi16(0x7fff))); }
    static uint32_t max_lane16(I v) {
        const __m128i m = _mm_max_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        // The one horizontal instruction finds a minimum: the largest is the complement of the smallest complement.
        const __m128i least = _mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi16(-1)));
        return ~static_cast<uint32_t>(_mm_cvtsi128_si32(least)) & 0xffff;
    }
    static void split_bf16(const uint16_t* p, F* even_odd) {
        const __m256i words = load_bits(p);
        even_odd[0] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
        even_odd[1] = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)));
    }

    // A binary search. `found` is minus the code's leading bits, as comparisons give -1; a permutation reads its low
    // three bits, so midpoint tables are stored from index 0 downwards, modulo 8.
    static I nearest(F v) {
        const auto& m = kNf4Midpoints;
        const F quarter = _mm256_setr_ps(m[1], 0, 0, 0, 0, m[13], m[9], m[5]);
        const F eighth = _mm256_setr_ps(m[0], m[14], m[12], m[10], m[8], m[6], m[4], m[2]);
        const F upper = _mm256_cmp_ps(v, set1(m[7]), _CMP_GT_OQ);
        I found = _mm256_castps_si256(upper);
        found = descend(found, v, _mm256_blendv_ps(set1(m[3]), set1(m[11]), upper));
        found = descend(found, v, _mm256_permutevar8x32_ps(quarter, found));
        found = descend(found, v, _mm256_permutevar8x32_ps(eighth, found));
        return _mm256_sub_epi32(_mm256_setzero_si256(), found);
    }
    static I truncate(F v) { return _mm256_cvttps_epi32(v); }

    static void pack(const I* codes, uint8_t* bytes) {
        const __m256i low = _mm256_packus_epi32(codes[0], codes[1]), high = _mm256_packus_epi32(codes[2], codes[3]);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_packus_epi16(low, high), _mm256_set1_epi16(0x0110));
        // 16-bit unit i of the lower lane is vector i's first two bytes, of the upper lane its last two.
        const __m256i units = _mm256_packus_epi16(pairs, pairs);
        const __m128i first = _mm256_castsi256_si128(units), second = _mm256_extracti128_si256(units, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm_unpacklo_epi16(first, second));
    }
    static void pack_even_odd(const I* codes, uint8_t* bytes) {
        const __m256i first = _mm256_or_si256(_mm256_slli_epi32(codes[0], 4), codes[1]);
        const __m256i second = _mm256_or_si256(_mm256_slli_epi32(codes[2], 4), codes[3]);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
        const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm_packus_epi16(low, high));
    }

    // The low and high bytes of 16 words, each looked up by a byte shuffle.
    struct WordTable {
        __m256i low, high;
        explicit WordTable(const uint16_t* values) {
            // Loaded as they were stored, 8 at a time: a wider load would wait until both stores have left the core.
            const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
            const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 8));
            const __m128i mask = _mm_set1_epi16(0xff);
            low =
                _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask)));
            high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
        }
        void decode(const uint8_t* bytes, uint16_t* out) const {
            const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
            const __m256i nibbles = _mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8));
            const __m256i codes = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
            const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
            const __m256i even = _mm256_unpacklo_epi8(l, h), odd = _mm256_unpackhi_epi8(l, h);
            __m256i* p = reinterpret_cast<__m256i*>(out);
            _mm256_storeu_si256(p, _mm256_permute2x128_si256(even, odd, 0x20));
            _mm256_storeu_si256(p + 1, _mm256_permute2x128_si256(even, odd, 0x31));
        }
    };

  private:
    static I descend(I found, F v, F midpoint) {
        const I above = _mm256_castps_si256(_mm256_cmp_ps(v, midpoint, _CMP_GT_OQ));
        return _mm256_add_epi32(_mm256_add_epi32(found, found), above);
    }
};

}  // namespace
}  // namespace peftkern

#include "cpu/quantize_kernel.h"

namespace peftkern {
const QuantizeKernels peftkern_quantize_avx2 = {quantize, quantize_absmax, dequantize};
}  // namespace peftkern
