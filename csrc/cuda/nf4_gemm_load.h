// What each thread brings into a stage: 16-byte copies (mma.sync kernels), boxes (wgmma kernels) and scales. Host and
// device: `copy` is a function of the caller's.
#pragma once

#include <type_traits>

#include "cuda/launchers.h"
#include "cuda/nf4_gemm_maps.h"

namespace peftkern {

// The length of the contraction, and the columns of the result.
template <class Shape>
PEFTKERN_BOTH int64_t depth_of(const CudaLinear& linear) {
    return Shape::kBackward ? linear.out_features : linear.in_features;
}
template <class Shape>
PEFTKERN_BOTH int64_t columns_of(const CudaLinear& linear) {
    return Shape::kBackward ? linear.in_features : linear.out_features;
}

// A block of the weight whose scale is wanted; what is not there has no scale.
struct ScalePlace {
    int64_t block;
    bool valid;
};

// Thread = 16 bytes of tokens [thread / 16 + 16 i], 16 bytes of codes [out thread / 4 + 64 i], one scale of each step.
template <int kTokens>
struct ForwardLoader {
    const CudaLinear& linear;
    const char* x;
    const uint8_t* codes;
    int64_t k, row_scales;
    int x_to, code_to, x_half, code_half, tokens_left, scale_half;
    bool has_row[2], has_scale;

    PEFTKERN_BOTH ForwardLoader(const CudaLinear& linear, const Tile& tile, int thread) : linear(linear) {
        const int token = thread >> 4, x_chunk = thread & 15, row = thread >> 2, code_chunk = thread & 3;
        k = int64_t{tile.step_begin} * Forward::kStep;
        x = static_cast<const char*>(linear.x) + ((tile.first_token + token) * linear.x_stride + k + x_chunk * 8) * 2;
        codes = linear.weight.codes + ((tile.first_column + row) * linear.in_features + k) / 2 + code_chunk * 16;
        x_half = x_chunk >> 3, code_half = code_chunk >> 1;
        x_to = x_half * kTokens * 128 + swizzle_128(token, x_chunk & 7);
        code_to = Forward::kCodesAt<kTokens> + swizzle_code_halves(row, code_chunk);
        const int64_t tokens = linear.rows - tile.first_token;
        tokens_left = static_cast<int>(tokens < kTokens ? tokens : kTokens) - token;
        has_row[0] = tile.first_column + row < linear.out_features;
        has_row[1] = tile.first_column + row + 64 < linear.out_features;
        const int64_t scale_row = tile.first_column + (thread & 127);
        scale_half = thread >> 7;
        has_scale = scale_row < linear.out_features;
        row_scales = scale_row * (linear.in_features >> linear.weight.block_shift);
    }

    // The copies of the next step: copy(offset in the stage, source, whether it is there; else zeros).
    template <class Copy>
    PEFTKERN_BOTH void next(Copy&& copy) {
        const bool x_inside = k + x_half * 64 < linear.in_features;
        PEFTKERN_UNROLLED for (int i = 0; i < kTokens / 16; ++i) {
            const bool valid = x_inside && i * 16 < tokens_left;
            copy(x_to + i * 16 * 128, valid ? x + i * 32 * linear.x_stride : linear.x, valid);
        }
        const bool codes_inside = k + code_half * 64 < linear.in_features;
        PEFTKERN_UNROLLED for (int i = 0; i < 2; ++i) {
            const bool valid = codes_inside && has_row[i];
            copy(code_to + i * 64 * 64, valid ? codes + i * 32 * linear.in_features : linear.weight.codes, valid);
        }
        x += Forward::kStep * 2;
        codes += Forward::kStep / 2;
        k += Forward::kStep;
    }

    // `step` counts from the weight's first column; the scale lies at float `thread` of the stage's scales.
    PEFTKERN_BOTH ScalePlace scale(int step) const {
        const int64_t at = int64_t{step} * Forward::kStep + scale_half * 64;
        return {row_scales + (at >> linear.weight.block_shift), has_scale && at < linear.in_features};
    }
};

// Thread = 16 bytes of dY [token thread / 8 + 32 i], 16 bytes of codes [out thread / 8 + 32 i], one scale of each step.
template <int kTokens>
struct BackwardLoader {
    const CudaLinear& linear;
    const char* y;
    const uint8_t* codes;
    int64_t k, column_scale;
    int to, row, chunk, tokens_left, scale_row;
    bool has_columns, has_scale;

    PEFTKERN_BOTH BackwardLoader(const CudaLinear& linear, const Tile& tile, int thread) : linear(linear) {
        row = thread >> 3, chunk = thread & 7;
        k = int64_t{tile.step_begin} * Backward::kStep;
        y = static_cast<const char*>(linear.x) + ((tile.first_token + row) * linear.x_stride + k + chunk * 8) * 2;
        codes = linear.weight.codes + ((k + row) * linear.in_features + tile.first_column) / 2 + chunk * 16;
        to = swizzle_128(row, chunk);
        const int64_t tokens = linear.rows - tile.first_token;
        tokens_left = static_cast<int>(tokens < kTokens ? tokens : kTokens) - row;
        has_columns = tile.first_column + chunk * 32 < linear.in_features;
        const int64_t scale_in = tile.first_column + (thread >> 6) * 64;
        scale_row = thread & 63;
        has_scale = scale_in < linear.in_features;
        column_scale = scale_in >> linear.weight.block_shift;
    }

    template <class Copy>
    PEFTKERN_BOTH void next(Copy&& copy) {
        const bool y_inside = k + chunk * 8 < linear.out_features;
        if (kTokens >= 32 || row < kTokens) {
            PEFTKERN_UNROLLED for (int i = 0; i < (kTokens + 31) / 32; ++i) {
                const bool valid = y_inside && i * 32 < tokens_left;
                copy(to + i * 32 * 128, valid ? y + i * 64 * linear.x_stride : linear.x, valid);
            }
        }
        PEFTKERN_UNROLLED for (int i = 0; i < 2; ++i) {
            const bool valid = has_columns && k + row + i * 32 < linear.out_features;
            copy(Backward::kCodesAt<kTokens> + to + i * 32 * 128,
                 valid ? codes + i * 16 * linear.in_features : linear.weight.codes, valid);
        }
        y += Backward::kStep * 2;
        codes += Backward::kStep * linear.in_features / 2;
        k += Backward::kStep;
    }

    PEFTKERN_BOTH ScalePlace scale(int step) const {
        const int64_t out = int64_t{step} * Backward::kStep + scale_row;
        return {out * (linear.in_features >> linear.weight.block_shift) + column_scale,
                has_scale && out < linear.out_features};
    }
};

template <class Shape, int kTokens>
using Loader = std::conditional_t<Shape::kBackward, BackwardLoader<kTokens>, ForwardLoader<kTokens>>;

// The wgmma kernels: boxes by one thread, load(which operand, offset in the stage, first column, first row) in elements
// of the operand; two scales of each step by each of 128 threads, at floats place(0) and place(1) of the stage's
// scales.
enum class Operand { kTokens, kCodes };

template <int kTokens>
struct ForwardBoxes {
    static constexpr int kCopyBytes = Forward::kScalesAt<kTokens>;
    const CudaLinear& linear;
    Tile tile;
    int thread;
    int64_t row_scales;
    bool has_row;

    PEFTKERN_BOTH ForwardBoxes(const CudaLinear& linear, const Tile& tile, int thread)
        : linear(linear), tile(tile), thread(thread) {
        const int64_t row = tile.first_column + thread;
        has_row = row < linear.out_features;
        row_scales = row * (linear.in_features >> linear.weight.block_shift);
    }

    template <class Load>
    PEFTKERN_BOTH void copy(int step, Load&& load) const {
        const int k = (tile.step_begin + step) * Forward::kStep;
        const int token = static_cast<int>(tile.first_token);
        load(Operand::kTokens, 0, k, token);
        load(Operand::kTokens, kTokens * 128, k + 64, token);
        load(Operand::kCodes, Forward::kCodesAt<kTokens>, k / 2, static_cast<int>(tile.first_column));
    }
    // Of one row of out, both halves.
    PEFTKERN_BOTH ScalePlace scale(int step, int half) const {
        const int64_t k = int64_t{tile.step_begin + step} * Forward::kStep + half * 64;
        return {row_scales + (k >> linear.weight.block_shift), has_row && k < linear.in_features};
    }
    PEFTKERN_BOTH int place(int half) const { return half * 128 + thread; }
};

template <int kTokens>
struct BackwardBoxes {
    static constexpr int kCopyBytes = Backward::kScalesAt<kTokens>;
    const CudaLinear& linear;
    Tile tile;
    int thread;
    int64_t row_blocks, block[2];
    bool has_block[2];

    PEFTKERN_BOTH BackwardBoxes(const CudaLinear& linear, const Tile& tile, int thread)
        : linear(linear), tile(tile), thread(thread), row_blocks(linear.in_features >> linear.weight.block_shift) {
        PEFTKERN_UNROLLED for (int i = 0; i < 2; ++i) {
            const int64_t in = tile.first_column + (place(i) >> 6) * 64;
            has_block[i] = in < linear.in_features;
            block[i] = in >> linear.weight.block_shift;
        }
    }

    template <class Load>
    PEFTKERN_BOTH void copy(int step, Load&& load) const {
        const int out = (tile.step_begin + step) * Backward::kStep;
        load(Operand::kTokens, 0, out, static_cast<int>(tile.first_token));
        load(Operand::kCodes, Backward::kCodesAt<kTokens>, static_cast<int>(tile.first_column / 2), out);
    }
    // Of row thread & 63 of out, blocks thread >> 6 and 2 + (thread >> 6) of in.
    PEFTKERN_BOTH ScalePlace scale(int step, int i) const {
        const int64_t out = int64_t{tile.step_begin + step} * Backward::kStep + (thread & 63);
        return {out * row_blocks + block[i], has_block[i] && out < linear.out_features};
    }
    PEFTKERN_BOTH int place(int i) const { return i * 128 + thread; }
};

template <class Shape, int kTokens>
using Boxes = std::conditional_t<Shape::kBackward, BackwardBoxes<kTokens>, ForwardBoxes<kTokens>>;

}  // namespace peftkern
