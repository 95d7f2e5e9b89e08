// What the tensor-core, matrix-load and TMA instructions do to a warp and to shared memory, as the PTX manual describes
// them: written without the kernels' own address functions, which are what is tested.
#pragma once

#include <stdint.h>
#include <string.h>

#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "cuda/nf4_gemm_decode.h"

namespace peftkern {

using Fragments = uint32_t[32][4];

inline double half_value(uint32_t bits, Dtype dtype) {
    const uint16_t half = static_cast<uint16_t>(bits);
    return dtype == Dtype::kBFloat16 ? float_of_bf16(half) : float_of_fp16(half);
}

// Row and column of register `i`, half `h` of lane's part of the 16 x 16 operand A.
inline int a_row(int lane, int i) {
    return lane / 4 + i % 2 * 8;
}
inline int a_column(int lane, int i, int h) {
    return lane % 4 * 2 + i / 2 * 8 + h;
}

inline void matrix_of(double (&a)[16][16], const Fragments& fragments, Dtype dtype) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            for (int h = 0; h < 2; ++h)
                a[a_row(lane, i)][a_column(lane, i, h)] = half_value(fragments[lane][i] >> 16 * h, dtype);
}

// mma.sync.m16n8k16: lane holds rows k = 2t, 2t+1 (+ 8) of column g of B; d: rows g, g+8, columns 2t, 2t+1.
inline void mma(double (&d)[32][4], const Fragments& a_registers, const uint32_t (&b)[32][2], Dtype dtype) {
    double a[16][16], columns[8][16];
    matrix_of(a, a_registers, dtype);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 2; ++i)
            for (int h = 0; h < 2; ++h)
                columns[lane / 4][lane % 4 * 2 + i * 8 + h] = half_value(b[lane][i] >> 16 * h, dtype);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 16; ++k) d[lane][i] += a[lane / 4 + i / 2 * 8][k] * columns[lane % 4 * 2 + i % 2][k];
}

// Element (token, k) of wgmma's K-major B in the 128-byte swizzle: 8-token groups lie a stride apart, and the hardware
// folds address bits 7..9 into bits 4..6.
inline double descriptor_element(const unsigned char* shared, uint64_t descriptor, int token, int k, Dtype dtype) {
    if (descriptor >> 62 != 1) abort();
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    uint32_t address = start + token / 8 * stride + token % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    memcpy(&bits, shared + address, 2);
    return half_value(bits, dtype);
}

// A warp's 16 rows of wgmma.m64nTk16 with A in registers; d[lane][tokens / 2].
inline void wgmma(std::vector<double> (&d)[32], const Fragments& a_registers, const unsigned char* shared,
                  uint64_t descriptor, int tokens, Dtype dtype) {
    double a[16][16];
    matrix_of(a, a_registers, dtype);
    std::vector<double> b(16 * tokens);
    for (int token = 0; token < tokens; ++token)
        for (int k = 0; k < 16; ++k) b[token * 16 + k] = descriptor_element(shared, descriptor, token, k, dtype);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < tokens / 2; ++i) {
            const int row = lane / 4 + i / 2 % 2 * 8, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) d[lane][i] += a[row][k] * b[token * 16 + k];
        }
}

// ldmatrix.x4: matrix m's eight rows of 16 bytes are at the addresses of lanes 8m .. 8m+7; a lane gets elements (g,
// 2t), (g, 2t+1) of each matrix, or of its transpose.
inline void load_matrices(Fragments& words, const unsigned char* shared, const int (&addresses)[32], bool transposed) {
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m) {
            uint16_t halves[2];
            for (int h = 0; h < 2; ++h) {
                const int first = lane / 4, second = lane % 4 * 2 + h;
                const int row = transposed ? second : first, column = transposed ? first : second;
                memcpy(&halves[h], shared + addresses[8 * m + row] + 2 * column, 2);
            }
            words[lane][m] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
        }
}

// A matrix in global memory, and TMA's copy of a box of it: outside is zeros; the swizzle of `width` bytes (64 or 128)
// folds address bits from 7 on into the bits from 4 on.
struct GlobalMatrix {
    const void* data;
    int64_t rows, row_bytes, pitch;
};
inline void load_box(unsigned char* shared, int to, const GlobalMatrix& from, int64_t byte, int64_t row, int box_rows,
                     int width) {
    const uint32_t fold = width == 128 ? 7 : 3;
    for (int r = 0; r < box_rows; ++r)
        for (int b = 0; b < width; ++b) {
            uint32_t address = to + r * width + b;
            address ^= (address >> 7 & fold) << 4;
            const bool inside = row + r < from.rows && byte + b < from.row_bytes;
            shared[address] =
                inside ? static_cast<const unsigned char*>(from.data)[(row + r) * from.pitch + byte + b] : 0;
        }
}

// The most 4-byte words that one bank has to deliver to the lanes that a request of `bytes` serves at a time.
inline int bank_ways(const int (&addresses)[32], int bytes) {
    int most = 0;
    const int together = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
    for (int first = 0; first < 32; first += together) {
        std::set<int> words[32];
        for (int lane = first; lane < first + together; ++lane)
            for (int word = addresses[lane] / 4; word < (addresses[lane] + bytes) / 4; ++word)
                words[word % 32].insert(word);
        for (const auto& bank : words) most = bank.size() > size_t(most) ? int(bank.size()) : most;
    }
    return most;
}

inline uint32_t random_bits() {
    static uint64_t state = 0x9e3779b97f4a7c15;
    state = state * 6364136223846793005 + 1442695040888963407;
    return static_cast<uint32_t>(state >> 33);
}

// The table as the kernels fill it.
inline std::vector<unsigned char> pair_table(Dtype dtype, bool exact) {
    std::vector<unsigned char> table(kPairTableBytes, 0xff);
    for (int store = 0; store < (exact ? kPair32Stores : kPair16Stores); ++store) {
        const int byte = exact ? pair32_store_byte(store) : pair16_store_byte(store);
        const uint32_t halves =
            dtype == Dtype::kBFloat16 ? pair16<Dtype::kBFloat16>(byte) : pair16<Dtype::kFloat16>(byte);
        const float pair[2] = {kNf4Codebook[byte >> 4], kNf4Codebook[byte & 15]};
        for (int i = 0; i < 16; i += exact ? 8 : 4)
            memcpy(&table[(exact ? pair32_store_address(store) : pair16_store_address(store)) + i],
                   exact ? static_cast<const void*>(pair) : &halves, exact ? 8 : 4);
    }
    return table;
}

}  // namespace peftkern
