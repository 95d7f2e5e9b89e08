// dX of nf4_linear by mma.sync: dX^T = W^T dY^T. Codes come out of shared memory transposed (ldmatrix on units of four
// codes), and every weight carries its scale, as nf4_dequantize rounds it: a scale per row of the contraction cannot
// wait for the sum. Tile 256 of in x T tokens; eight warps of 32 of in; a stage is 64 of out.
#include "cuda/mma_sm80.h"
#include "cuda/nf4_gemm_decode.h"
#include "cuda/nf4_gemm_device.h"
#include "cuda/nf4_gemm_launch.h"
#include "cuda/ptx.h"

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
    float* map = reinterpret_cast<float*>(shared + kMapOffset);
    unsigned char* stages = shared + kStagesOffsetSm80;
    constexpr int kStageBytes = Backward::kBytes<kTokens>;
    const CudaLinear& linear = gemm.linear;
    const Tile tile = tile_of(blockIdx.x, blockIdx.y, kTokens, Backward::kTile, steps_of(linear.rows, kTokens),
                              static_cast<int>(steps_of(linear.out_features, Backward::kStep)), gemm.plan.slice_steps);
    const ScaleReader reader(linear.weight, map, 1.0f);
    BackwardLoader<kTokens> loader(linear, tile, threadIdx.x);
    const auto copy = [&](int slot) {
        const uint32_t stage = shared_address(stages) + slot * kStageBytes;
        loader.next([&](int to, const void* from, bool valid) { copy_async(stage + to, from, valid); });
    };
    const auto store_scale = [&](int slot, RawScale raw) {
        float* scales = reinterpret_cast<float*>(stages + slot * kStageBytes + Backward::kScalesAt<kTokens>);
        scales[threadIdx.x] = reader.decode(raw);
    };

    RawScale first_scales[kMostStagesSm80 - 1];
#pragma unroll
    for (int i = 0; i < kMostStagesSm80 - 1; ++i) {
        first_scales[i] = reader.fetch(loader.scale(tile.step_begin + i));
        if (i >= stage_count - 1) continue;
        if (i < tile.steps) copy(i);
        commit_copies();
    }
    RawScale ahead = reader.fetch(loader.scale(tile.step_begin + stage_count - 1));
    fill_map(map, linear.weight, threadIdx.x, kThreadsSm80);
    fill_pair32(shared, threadIdx.x, kThreadsSm80);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMostStagesSm80 - 1; ++i)
        if (i < stage_count - 1) store_scale(i, first_scales[i]);

    const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
    float sums[2][kTokens / 8][4] = {};
    int slot = 0, fill = stage_count - 1;
#pragma unroll 1
    for (int step = 0; step < tile.steps; ++step) {
        wait_for_stage(stage_count);
        __syncthreads();
        if (step + stage_count - 1 < tile.steps) {
            copy(fill);
            store_scale(fill, ahead);
        }
        commit_copies();
        ahead = reader.fetch(loader.scale(tile.step_begin + step + stage_count));
        const unsigned char* stage = stages + slot * kStageBytes;
        multiply_half<kDtype, kTokens>(sums, stage, shared, 0, warp, lane);
        multiply_half<kDtype, kTokens>(sums, stage, shared, 1, warp, lane);
        slot = slot + 1 == stage_count ? 0 : slot + 1;
        fill = fill + 1 == stage_count ? 0 : fill + 1;
    }
    wait_copies<0>();

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

template <Dtype kDtype, int kTokens>
int launch_tokens(const CudaGemm& gemm, const DeviceTraits& traits, int device, void* stream) {
    const int stages = stages_that_fit(traits, Backward::kBytes<kTokens>);
    if (stages < 2) return cudaErrorInvalidConfiguration;
    const int bytes = kStagesOffsetSm80 + stages * Backward::kBytes<kTokens>;
    return launch_tiles<nf4_gemm_backward_sm80<kDtype, kTokens>>(gemm, gemm.linear.in_features, Backward::kTile,
                                                                 kThreadsSm80, bytes, device, stream, gemm, stages);
}

template <Dtype kDtype>
int launch_dtype(const CudaGemm& gemm, const DeviceTraits& traits, int device, void* stream) {
    return for_tile<16, 32, 64>(gemm.plan.tokens, [&](auto tokens) {
        return launch_tokens<kDtype, decltype(tokens)::value>(gemm, traits, device, stream);
    });
}

}  // namespace
}  // namespace peftkern

extern "C" int peftkern::peftkern_cuda_nf4_gemm_backward_sm80(const CudaGemm* gemm, const DeviceTraits* traits,
                                                              int device, void* stream) {
    return gemm->linear.dtype == Dtype::kBFloat16 ? launch_dtype<Dtype::kBFloat16>(*gemm, *traits, device, stream)
                                                  : launch_dtype<Dtype::kFloat16>(*gemm, *traits, device, stream);
}
