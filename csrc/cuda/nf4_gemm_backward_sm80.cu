// dX of nf4_linear by mma.sync: dX^T = W^T dY^T. Codes come out of shared memory transposed (ldmatrix on units of four
// codes), and every weight carries its scale, as nf4_dequantize rounds it: a scale per row of the contraction cannot
// wait for the sum. Tile 256 of in x T tokens; eight warps of 32 of in; a stage is 64 of out.
#include "cuda/nf4_gemm_decode.h"
#include "cuda/nf4_gemm_sm80.h"

namespace peftkern {
namespace {

// 32 of out of one stage: 32 of in x T tokens of a warp.
template <Dtype kDtype, int kTokens>
__device__ __forceinline__ void multiply_half(float (&sums)[2][kTokens / 8][4], const unsigned char* stage,
                                              const unsigned char* table, int half, int warp, int lane) {
    uint32_t words[4];
    load_matrices_transposed(
        words, shared_address(stage) + Backward::kCodesAt<kTokens> + backward_code_address(half, warp, lane));
    const float* stage_scales = reinterpret_cast<const float*>(stage + Backward::kScalesAt<kTokens>);
    Pair scales[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        const float2 pair = *reinterpret_cast<const float2*>(stage_scales + backward_scale_index(half, warp, m, lane));
        scales[m] = {pair.x, pair.y};
    }
    uint32_t fragments[2][2][4];
    decode_transposed<kDtype>(fragments, words, scales, table, lane * 8);
#pragma unroll
    for (int column = 0; column < kTokens / 8; ++column) {
        uint32_t tokens[4];
        load_matrices(tokens, shared_address(stage) + backward_x_address(half, column, lane));
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            multiply_add<kDtype>(sums[tile][column], fragments[0][tile], tokens[0], tokens[1]);
            multiply_add<kDtype>(sums[tile][column], fragments[1][tile], tokens[2], tokens[3]);
        }
    }
}

template <Dtype kDtype, int kTokens>
__global__ void __launch_bounds__(kThreadsSm80, 1) nf4_gemm_backward_sm80(const CudaGemm gemm, const int stage_count) {
    unsigned char* shared = dynamic_shared();
    const CudaLinear& linear = gemm.linear;
    const Tile tile = tile_of_block<Backward, kTokens>(gemm);
    const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
    float sums[2][kTokens / 8][4] = {};
    run_ring<Backward, kTokens>(
        gemm, tile, stage_count, 1.0f, shared, [&] { fill_pair32(shared, threadIdx.x, kThreadsSm80); },
        [&](const unsigned char* stage) {
            multiply_half<kDtype, kTokens>(sums, stage, shared, 0, warp, lane);
            multiply_half<kDtype, kTokens>(sums, stage, shared, 1, warp, lane);
        });

    const int64_t in = tile.first_column + warp * 32 + backward_in(lane, 0, 0);
    if (in >= linear.in_features) return;
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
        const int column = i >> 1, odd = i & 1;
        const int64_t token = tile.first_token + column * 8 + accumulator_token(lane, odd);
        if (token >= linear.rows) continue;
        float values[4] = {sums[0][column][odd], sums[0][column][odd + 2], sums[1][column][odd],
                           sums[1][column][odd + 2]};
        store_four<kDtype, true, false>(linear, blockIdx.y, token, in, linear.in_features, values);
    }
}

template <Dtype kDtype>
int launch_dtype(const CudaGemm& gemm, const DeviceTraits& traits, int device, void* stream) {
    return for_tile<16, 32, 64>(gemm.plan.tokens, [&](auto tokens) {
        constexpr int kTokens = decltype(tokens)::value;
        return launch_ring<Backward, kTokens, nf4_gemm_backward_sm80<kDtype, kTokens>>(gemm, traits, device, stream);
    });
}

}  // namespace
}  // namespace peftkern

extern "C" int peftkern::peftkern_cuda_nf4_gemm_backward_sm80(const CudaGemm* gemm, const DeviceTraits* traits,
                                                              int device, void* stream) {
    return gemm->linear.dtype == Dtype::kBFloat16 ? launch_dtype<Dtype::kBFloat16>(*gemm, *traits, device, stream)
                                                  : launch_dtype<Dtype::kFloat16>(*gemm, *traits, device, stream);
}
