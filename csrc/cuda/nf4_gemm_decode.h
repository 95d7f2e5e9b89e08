// Codes to tensor-core fragments, per lane. Host and device: the tests run these functions for every lane.
#pragma once

#include "cuda/nf4_gemm_maps.h"

namespace peftkern {

struct Pair {
    float x, y;
};

// The entry of byte `i` of `word`: two 16-bit values, the earlier in the low half.
PEFTKERN_BOTH uint32_t look_up_halves(const unsigned char* table, uint32_t word, int i, uint32_t lane_offset) {
    const unsigned char* entry = table + pair_address(word, i, lane_offset);
#ifdef __CUDA_ARCH__
    return *reinterpret_cast<const uint32_t*>(entry);
#else
    uint32_t halves;
    memcpy(&halves, entry, sizeof halves);
    return halves;
#endif
}

PEFTKERN_BOTH Pair look_up_pair(const unsigned char* table, uint32_t word, int i, uint32_t lane_offset) {
    const unsigned char* entry = table + pair_address(word, i, lane_offset);
#ifdef __CUDA_ARCH__
    const float2 pair = *reinterpret_cast<const float2*>(entry);
    return {pair.x, pair.y};
#else
    Pair pair;
    memcpy(&pair, entry, sizeof pair);
    return pair;
#endif
}

// The order of sm80_code_address: byte i of the lane's eight is k = 16t + 2i, and the next.
PEFTKERN_BOTH void decode_permuted(uint32_t (&fragments)[4][4], const uint32_t (&low_row)[2],
                                   const uint32_t (&high_row)[2], const unsigned char* table, uint32_t lane_offset) {
    PEFTKERN_UNROLLED for (int j = 0; j < 4; ++j) {
        const int word = j >> 1, byte = 2 * j & 3;
        fragments[j][0] = look_up_halves(table, low_row[word], byte, lane_offset);
        fragments[j][1] = look_up_halves(table, high_row[word], byte, lane_offset);
        fragments[j][2] = look_up_halves(table, low_row[word], byte + 1, lane_offset);
        fragments[j][3] = look_up_halves(table, high_row[word], byte + 1, lane_offset);
    }
}

// The natural order: byte t of word j is k = 8j + 2t, and the next; words 2s and 2s+1 make step s of 16.
PEFTKERN_BOTH void decode_natural(uint32_t (&fragments)[4][4], const uint32_t (&low_row)[8],
                                  const uint32_t (&high_row)[8], const unsigned char* table, uint32_t lane_offset,
                                  int byte) {
    PEFTKERN_UNROLLED for (int j = 0; j < 8; ++j) {
        fragments[j >> 1][(j & 1) * 2] = look_up_halves(table, low_row[j], byte, lane_offset);
        fragments[j >> 1][(j & 1) * 2 + 1] = look_up_halves(table, high_row[j], byte, lane_offset);
    }
}

// As decode_natural, each weight the rounded fp32 product that nf4_dequantize gives.
template <Dtype kDtype>
PEFTKERN_BOTH void decode_natural_exact(uint32_t (&fragments)[4][4], const uint32_t (&low_row)[8],
                                        const uint32_t (&high_row)[8], float low_scale, float high_scale,
                                        const unsigned char* table, uint32_t lane_offset, int byte) {
    PEFTKERN_UNROLLED for (int j = 0; j < 8; ++j) {
        const Pair low = look_up_pair(table, low_row[j], byte, lane_offset);
        const Pair high = look_up_pair(table, high_row[j], byte, lane_offset);
        fragments[j >> 1][(j & 1) * 2] = pack_halves<kDtype>(low.x * low_scale, low.y * low_scale);
        fragments[j >> 1][(j & 1) * 2 + 1] = pack_halves<kDtype>(high.x * high_scale, high.y * high_scale);
    }
}

// dX. words[m]: bytes {2g, 2g+1} of out rows 8m + 2t (low half) and 8m + 2t + 1 (high half), as a transposing ldmatrix
// leaves them; scales[m]: of those two rows. fragments[s][tile]: step s of 16 rows of out; packing the two rows'
// products is the transposition.
template <Dtype kDtype>
PEFTKERN_BOTH void decode_transposed(uint32_t (&fragments)[2][2][4], const uint32_t (&words)[4],
                                     const Pair (&scales)[4], const unsigned char* table, uint32_t lane_offset) {
    PEFTKERN_UNROLLED for (int m = 0; m < 4; ++m) {
        PEFTKERN_UNROLLED for (int tile = 0; tile < 2; ++tile) {
            const Pair even = look_up_pair(table, words[m], tile, lane_offset);
            const Pair odd = look_up_pair(table, words[m], tile + 2, lane_offset);
            uint32_t (&fragment)[4] = fragments[m >> 1][tile];
            fragment[(m & 1) * 2] = pack_halves<kDtype>(even.x * scales[m].x, odd.x * scales[m].y);
            fragment[(m & 1) * 2 + 1] = pack_halves<kDtype>(even.y * scales[m].x, odd.y * scales[m].y);
        }
    }
}

}  // namespace peftkern
