// dX of nf4_linear by wgmma: dX^T = W^T dY^T. Codes come out of shared memory transposed (ldmatrix on units of four
// codes) into the register operand, every weight as nf4_dequantize rounds it: a scale per row of the contraction cannot
// wait for the sum. Tile 256 of in x T tokens; two consumer warpgroups of 128 in as two products of 64, one producer
// warpgroup.
#include "cuda/nf4_gemm_decode.h"
#include "cuda/nf4_gemm_tma.h"

namespace peftkern {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <Dtype kDtype, int kTokens>
struct BackwardConsumer : Consumer<Backward, kTokens> {
    using Base = Consumer<Backward, kTokens>;
    using Base::Base;

    float sums[2][kTokens / 2] = {};
    uint32_t fragments[2][2][2][4];  // [half][step of 16][tile]

    template <int kHalf>
    __device__ void decode(int slot) {
        const unsigned char* stage = this->stages + slot * Base::kStageBytes;
        uint32_t words[4];
        load_matrices_transposed(words, shared_address(stage) + Backward::kCodesAt<kTokens> +
                                            backward_code_address(kHalf, this->warp, this->lane));
        const float* stage_scales = reinterpret_cast<const float*>(stage + Backward::kScalesAt<kTokens>);
        Pair scales[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const float2 pair =
                *reinterpret_cast<const float2*>(stage_scales + backward_scale_index(kHalf, this->warp, m, this->lane));
            scales[m] = {pair.x, pair.y};
        }
        decode_transposed<kDtype>(fragments[kHalf], words, scales, this->table, this->lane * 8);
    }

    template <int kHalf>
    __device__ void multiply(int slot) {
        begin_products();
#pragma unroll
        for (int k16 = 0; k16 < 2; ++k16) {
            const uint64_t tokens = this->descriptor(slot, token_step_offset(kHalf * 2 + k16));
            Product<kDtype, kTokens>::run(sums[0], fragments[kHalf][k16][0], tokens, true);
            Product<kDtype, kTokens>::run(sums[1], fragments[kHalf][k16][1], tokens, true);
        }
        commit_products();
    }

    template <int kInFlight>
    __device__ void wait_products() {
        wait_products_in_flight<kInFlight>();
        if (kInFlight == 0) {
            hold(sums[0]);
            hold(sums[1]);
        }
    }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <Dtype kDtype, int kTokens>
__global__ void __launch_bounds__(kThreadsSm90, 1)
    nf4_gemm_backward_sm90(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap code_map,
                           const __grid_constant__ CudaGemm gemm) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const CudaLinear& linear = gemm.linear;
    unsigned char* shared = dynamic_shared();
    constexpr int kStages = kStagesOf<Backward, kTokens>;
    const Tile tile = tile_of_block<Backward, kTokens>(gemm);
    const auto barriers = start_ring<kStages>(shared, x_map, code_map);
    if (threadIdx.x >= kConsumerThreads) {
        run_producer<Backward, kTokens>(gemm, tile, x_map, code_map, barriers, 1.0f, shared);
        return;
    }
    take_registers<kConsumerRegisters>();
    fill_pair32(shared, threadIdx.x, kConsumerThreads);
    sync_part<2, kConsumerThreads>();
    BackwardConsumer<kDtype, kTokens> consumer(barriers, shared);
    consume_exact<kStages>(tile.steps, consumer);

    // A thread holds four neighbours of in for each of its tokens.
    const int64_t in = tile.first_column + consumer.warp * 32 + backward_in(consumer.lane, 0, 0);
    if (in >= linear.in_features) return;
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
        const int first = (i >> 1) * 4 + (i & 1);
        const int64_t token = tile.first_token + (i >> 1) * 8 + accumulator_token(consumer.lane, i & 1);
        if (token >= linear.rows) continue;
        float values[4] = {consumer.sums[0][first], consumer.sums[0][first + 2], consumer.sums[1][first],
                           consumer.sums[1][first + 2]};
        store_four<kDtype, true, false>(linear, blockIdx.y, token, in, linear.in_features, values);
    }
#endif
}

template <Dtype kDtype>
int launch_dtype(const CudaGemm& gemm, int device, void* stream) {
    return for_tile<16, 32, 64, 128>(gemm.plan.tokens, [&](auto tokens) {
        constexpr int kTokens = decltype(tokens)::value;
        return launch_wgmma<Backward, kTokens, nf4_gemm_backward_sm90<kDtype, kTokens>>(gemm, device, stream);
    });
}

}  // namespace
}  // namespace peftkern

extern "C" int peftkern::peftkern_cuda_nf4_gemm_backward_sm90(const CudaGemm* gemm, int device, void* stream) {
    return gemm->linear.dtype == Dtype::kBFloat16 ? launch_dtype<Dtype::kBFloat16>(*gemm, device, stream)
                                                  : launch_dtype<Dtype::kFloat16>(*gemm, device, stream);
}
