// Where everything of the NF4 GEMMs lies: tiles, slices, shared memory, and which lane reads which byte. Host and
// device, so that the tests replay the kernels' own arithmetic on the CPU.
//
// The weight is the tensor core's A operand (16 rows of out, or of in for dX) and goes from codes to registers; the
// tokens are the columns. A "step" is what one pipeline stage holds: 128 of in (forward) or 64 of out (dX).
#pragma once

#include <stdint.h>

#include "cuda/nf4_maps.h"

// Before a loop that the device compiler unrolls, or leaves as it is; a host compiler does not know the pragma.
#ifdef __CUDA_ARCH__
#define PEFTKERN_UNROLLED _Pragma("unroll")
#define PEFTKERN_ROLLED _Pragma("unroll 1")
#else
#define PEFTKERN_UNROLLED
#define PEFTKERN_ROLLED
#endif

namespace peftkern {

// The pair table and what stands behind it, in every GEMM: a nested quantisation map, then the barriers.
constexpr int kMapOffset = kPairTableBytes;
constexpr int kBarrierOffset = kMapOffset + 1024;

constexpr int kThreadsSm80 = 256;
constexpr int kThreadsSm90 = 384;  // two consumer warpgroups and the producer

// A tile's columns of the result, and what one step of it is made of, in this order in its stage.
template <bool kIsBackward, int kStepDepth, int kTileColumns>
struct Stage {
    static constexpr bool kBackward = kIsBackward;
    static constexpr int kStep = kStepDepth;
    static constexpr int kTile = kTileColumns;
    static constexpr int kCodeBytes = kTile * kStep / 2;
    static constexpr int kScaleBytes = kTile / 64 * kStep * 4;
    template <int kTokens>
    static constexpr int kCodesAt = kTokens * kStep * 2;
    template <int kTokens>
    static constexpr int kScalesAt = kCodesAt<kTokens> + kCodeBytes;
    template <int kTokens>
    static constexpr int kBytes = kScalesAt<kTokens> + kScaleBytes;
};
// x [2 halves of 64][T tokens][128 B], codes [128 out][64 B], scales fp32 [2 halves][128 out].
using Forward = Stage<false, 128, 128>;
// dY [T tokens][128 B], codes [64 out][128 B], scales fp32 [4 blocks of 64 in][64 out].
using Backward = Stage<true, 64, 256>;

// cp.async kernels place their first stage after the map (no barriers), TMA kernels after the barriers, 1024-aligned as
// the 128-byte swizzle wants it.
constexpr int kStagesOffsetSm80 = kMapOffset + 1024;
constexpr int kStagesOffsetSm90 = kBarrierOffset + 1024;

// 16-byte chunk `chunk` of a 128-byte row: eight rows of one chunk meet all 32 banks. Equal to TMA's 128-byte swizzle.
PEFTKERN_BOTH int swizzle_128(int row, int chunk) {
    return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// TMA's 64-byte swizzle of 64-byte rows.
PEFTKERN_BOTH int swizzle_64(int row, int chunk) {
    return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// Codes of the mma.sync forward kernel: rows 0, 1 and 2, 3 put the same half into different banks, so that the 8-byte
// reads of half a warp (four rows, 32 bytes each) do not meet.
PEFTKERN_BOTH int swizzle_code_halves(int row, int chunk) {
    return row * 64 + ((chunk ^ (row & 2)) << 4);
}

// mma.sync forward. Within a block of 64, lane t of a quad owns k = 16t .. 16t+15: step j of the four multiplies
// k = 16t + 4j + {0, 1; 2, 3}. Both operands use the order, so the product does not see it.
PEFTKERN_BOTH int sm80_code_address(int row, int half, int lane) {
    const int t = lane & 3;
    return swizzle_code_halves(row, 2 * half + (t >> 1)) + (t & 1) * 8;
}
PEFTKERN_BOTH int sm80_x_address(int tokens, int half, int column_tile, int lane, int part) {
    const int token = column_tile * 8 + (lane >> 2);
    return half * tokens * 128 + swizzle_128(token, 2 * (lane & 3) + part);
}

// ldmatrix for dX: lane's row address. Codes (transposed): 32 rows of out, the warp's 16 bytes (32 of in). dY: 8 tokens
// and 32 of out, matrix m = lane / 8 holding out 8m .. 8m+7.
PEFTKERN_BOTH int backward_code_address(int half, int warp, int lane) {
    return swizzle_128(half * 32 + lane, warp);
}
PEFTKERN_BOTH int backward_x_address(int half, int column_tile, int lane) {
    return swizzle_128(column_tile * 8 + (lane & 7), half * 4 + (lane >> 3));
}
// fp32 index of the scales of out rows m*8 + 2t and the next, m of 0..3, for the warp's in values.
PEFTKERN_BOTH int backward_scale_index(int half, int warp, int m, int lane) {
    return (warp >> 1) * Backward::kStep + half * 32 + m * 8 + 2 * (lane & 3);
}

// wgmma forward: 16-byte piece `part` of a row's 32 code bytes of one half; the four lanes of a quad read the same.
PEFTKERN_BOTH int sm90_code_address(int row, int half, int part) {
    return swizzle_64(row, 2 * half + part);
}
PEFTKERN_BOTH int sm90_row(int warp, int lane) {
    return warp * 16 + (lane >> 2);
}

// wgmma's descriptor of the token operand: K-major, 128-byte swizzle, 1024 bytes from one 8 tokens to the next.
PEFTKERN_BOTH uint64_t token_descriptor(uint32_t shared_address) {
    return (uint64_t(1) << 62) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 16) | ((shared_address & 0x3ffff) >> 4);
}
// Bytes from the start of a half's (forward) or a stage's (dX) tokens to a step of 16.
PEFTKERN_BOTH int token_step_offset(int k16) {
    return k16 * 32;
}

// The finished tile in shared memory, fp32 [T tokens][kRowPitch]: a warp's writes (4 pairs of tokens, 8 of out) and the
// 16-byte reads along out are free of conflicts.
constexpr int kRowPitch = Forward::kTile + 4;
PEFTKERN_BOTH int tile_index(int token, int out) {
    return token * kRowPitch + out;
}

// Accumulator element `i` of a column tile of 8: row g or g+8 of 16, token 2t or 2t+1.
PEFTKERN_BOTH int accumulator_row(int lane, int i) {
    return (lane >> 2) + (i >> 1) * 8;
}
PEFTKERN_BOTH int accumulator_token(int lane, int i) {
    return (lane & 3) * 2 + (i & 1);
}

// dX: the two 16-row tiles of a warp hold in values 4g, 4g+1 and 4g+2, 4g+3 as their rows g and g+8: a thread ends with
// four neighbours of each token.
PEFTKERN_BOTH int backward_in(int lane, int tile, int high_row) {
    return (lane >> 2) * 4 + tile * 2 + high_row;
}

PEFTKERN_BOTH int64_t steps_of(int64_t length, int64_t step) {
    return (length + step - 1) / step;
}

struct Tile {
    int64_t first_token, first_column;
    int step_begin, steps;
};

// Tokens run fastest, so that the blocks that share codes meet in L2.
PEFTKERN_BOTH Tile tile_of(int64_t block, int slice, int tokens, int columns, int64_t token_tiles, int total_steps,
                           int slice_steps) {
    Tile tile;
    tile.first_token = block % token_tiles * tokens;
    tile.first_column = block / token_tiles * columns;
    tile.step_begin = slice * slice_steps;
    const int left = total_steps - tile.step_begin;
    tile.steps = left < slice_steps ? left : slice_steps;
    return tile;
}

}  // namespace peftkern
