// nf4_linear for 9 to some hundred rows by mma.sync: y^T = W x^T, codes straight to fragments, each block of 64 scaled
// in fp32 after its product. Tile 128 of out x T tokens; eight warps, four of 32 out for each half of a 128-deep stage.
#include "cuda/nf4_gemm_decode.h"
#include "cuda/nf4_gemm_sm80.h"

namespace peftkern {
namespace {

// One block of 64 of one stage: 32 out x T tokens of a warp.
template <Dtype kDtype, int kTokens>
__device__ __forceinline__ void multiply_block(float (&sums)[2][kTokens / 8][4], const unsigned char* stage,
                                               const unsigned char* table, int half, int first_row, int lane) {
    const unsigned char* codes = stage + Forward::kCodesAt<kTokens>;
    const float* scales = reinterpret_cast<const float*>(codes + Forward::kCodeBytes) + half * 128;
    uint32_t fragments[2][4][4];
    float row_scales[2][2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        uint32_t words[2][2];
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            const int row = first_row + tile * 16 + high * 8 + (lane >> 2);
            const uint2 read = *reinterpret_cast<const uint2*>(codes + sm80_code_address(row, half, lane));
            words[high][0] = read.x, words[high][1] = read.y;
            row_scales[tile][high] = scales[row];
        }
        decode_permuted(fragments[tile], words[0], words[1], table, lane * 4);
    }
#pragma unroll
    for (int column = 0; column < kTokens / 8; ++column) {
        const uint4 low = *reinterpret_cast<const uint4*>(stage + sm80_x_address(kTokens, half, column, lane, 0));
        const uint4 high = *reinterpret_cast<const uint4*>(stage + sm80_x_address(kTokens, half, column, lane, 1));
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            float block[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            multiply_add<kDtype>(block, fragments[tile][0], low.x, low.y);
            multiply_add<kDtype>(block, fragments[tile][1], low.z, low.w);
            multiply_add<kDtype>(block, fragments[tile][2], high.x, high.y);
            multiply_add<kDtype>(block, fragments[tile][3], high.z, high.w);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][column][i] += row_scales[tile][i >> 1] * block[i];
        }
    }
}

template <Dtype kDtype, int kTokens>
__global__ void __launch_bounds__(kThreadsSm80, 1) nf4_gemm_sm80(const CudaGemm gemm, const int stage_count) {
    unsigned char* shared = dynamic_shared();
    const CudaLinear& linear = gemm.linear;
    const Tile tile = tile_of_block<Forward, kTokens>(gemm);
    const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
    const int half = warp >> 2, first_row = (warp & 3) * 32;
    float sums[2][kTokens / 8][4] = {};
    run_ring<Forward, kTokens>(
        gemm, tile, stage_count, pair16_unscale<kDtype>(), shared,
        [&] { fill_pair16<kDtype>(shared, threadIdx.x, kThreadsSm80); },
        [&](const unsigned char* stage) {
            multiply_block<kDtype, kTokens>(sums, stage, shared, half, first_row, lane);
        });

    // The halves' sums meet in shared memory, over the table and the stages, and leave as rows of y.
    __syncthreads();
    float* result = reinterpret_cast<float*>(shared);
    constexpr int kHalf = kTokens * kRowPitch;
#pragma unroll
    for (int i = 0; i < 2 * (kTokens / 8) * 4; ++i) {
        const int row_tile = i / (kTokens / 2), column = i / 4 % (kTokens / 8), element = i & 3;
        const int token = column * 8 + accumulator_token(lane, element);
        const int out = first_row + row_tile * 16 + accumulator_row(lane, element);
        result[half * kHalf + tile_index(token, out)] = sums[row_tile][column][element];
    }
    __syncthreads();
    for (int piece = threadIdx.x; piece < kTokens * 32; piece += kThreadsSm80) {
        const int token = piece >> 5, out = (piece & 31) * 4;
        if (tile.first_token + token >= linear.rows || tile.first_column + out >= linear.out_features) continue;
        const float4 a = *reinterpret_cast<const float4*>(result + tile_index(token, out));
        const float4 b = *reinterpret_cast<const float4*>(result + kHalf + tile_index(token, out));
        float values[4] = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
        store_four<kDtype, false, true>(linear, blockIdx.y, tile.first_token + token, tile.first_column + out,
                                        linear.out_features, values);
    }
}

template <Dtype kDtype>
int launch_dtype(const CudaGemm& gemm, const DeviceTraits& traits, int device, void* stream) {
    return for_tile<16, 32, 64>(gemm.plan.tokens, [&](auto tokens) {
        constexpr int kTokens = decltype(tokens)::value;
        return launch_ring<Forward, kTokens, nf4_gemm_sm80<kDtype, kTokens>>(gemm, traits, device, stream);
    });
}

}  // namespace
}  // namespace peftkern

extern "C" int peftkern::peftkern_cuda_nf4_gemm_sm80(const CudaGemm* gemm, const DeviceTraits* traits, int device,
                                                     void* stream) {
    return gemm->linear.dtype == Dtype::kBFloat16 ? launch_dtype<Dtype::kBFloat16>(*gemm, *traits, device, stream)
                                                  : launch_dtype<Dtype::kFloat16>(*gemm, *traits, device, stream);
}
