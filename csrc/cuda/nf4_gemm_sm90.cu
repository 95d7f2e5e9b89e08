// nf4_linear for 9 to some hundred rows by wgmma: y^T = W x^T with the weight's codes decoded straight into the
// register operand. Tile 128 of out x T tokens; two consumer warpgroups of 64 out, one producer warpgroup: TMA and the
// scales. T <= 64: 16-bit codes, each block of 64 scaled in fp32 after its product. T >= 128: the weights of
// nf4_dequantize.
#include "cuda/nf4_gemm_decode.h"
#include "cuda/nf4_gemm_tma.h"

namespace peftkern {
namespace {

template <int kTokens>
constexpr bool kExact = kTokens >= 128;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <Dtype kDtype, int kTokens>
struct ForwardConsumer : Consumer<Forward, kTokens> {
    using Base = Consumer<Forward, kTokens>;
    using Base::Base;

    float sums[kTokens / 2] = {};
    float block[kExact<kTokens> ? 1 : kTokens / 2] = {};
    uint32_t fragments[2][4][4];

    __device__ const float* row_scales(int slot, int half) const {
        const auto* scales =
            reinterpret_cast<const float*>(this->stages + slot * Base::kStageBytes + Forward::kScalesAt<kTokens>);
        return scales + half * 128 + sm90_row(this->warp, this->lane);
    }

    template <int kHalf>
    __device__ void decode(int slot) {
        const unsigned char* codes = this->stages + slot * Base::kStageBytes + Forward::kCodesAt<kTokens>;
        uint32_t words[2][8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = sm90_row(this->warp, this->lane) + (i >> 1) * 8, part = i & 1;
            const uint4 read = *reinterpret_cast<const uint4*>(codes + sm90_code_address(row, kHalf, part));
            words[i >> 1][part * 4] = read.x, words[i >> 1][part * 4 + 1] = read.y;
            words[i >> 1][part * 4 + 2] = read.z, words[i >> 1][part * 4 + 3] = read.w;
        }
        const int byte = this->lane & 3;
        if constexpr (kExact<kTokens>) {
            const float* scales = row_scales(slot, kHalf);
            decode_natural_exact<kDtype>(fragments[kHalf], words[0], words[1], scales[0], scales[8], this->table,
                                         this->lane * 8, byte);
        } else {
            decode_natural(fragments[kHalf], words[0], words[1], this->table, this->lane * 4, byte);
        }
    }

    template <int kHalf>
    __device__ void multiply(int slot) {
        begin_products();
#pragma unroll
        for (int k16 = 0; k16 < 4; ++k16) {
            const uint64_t tokens = this->descriptor(slot, kHalf * kTokens * 128 + token_step_offset(k16));
            if constexpr (kExact<kTokens>) {
                Product<kDtype, kTokens>::run(sums, fragments[kHalf][k16], tokens, true);
            } else {
                Product<kDtype, kTokens>::run(block, fragments[kHalf][k16], tokens, k16 > 0);
            }
        }
        commit_products();
    }

    template <int kInFlight>
    __device__ void wait_products() {
        wait_products_in_flight<kInFlight>();
        if constexpr (kExact<kTokens>) {
            if (kInFlight == 0) hold(sums);
        } else {
            hold(block);
        }
    }

    template <int kHalf>
    __device__ void promote(int slot) {
        const float* scales = row_scales(slot, kHalf);
        const float low = scales[0], high = scales[8];
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) sums[i] += (i & 2 ? high : low) * block[i];
    }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <Dtype kDtype, int kTokens>
__global__ void __launch_bounds__(kThreadsSm90, 1)
    nf4_gemm_sm90(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap code_map,
                  const __grid_constant__ CudaGemm gemm) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const CudaLinear& linear = gemm.linear;
    unsigned char* shared = dynamic_shared();
    constexpr int kStages = kStagesOf<Forward, kTokens>;
    const Tile tile = tile_of_block<Forward, kTokens>(gemm);
    const auto barriers = start_ring<kStages>(shared, x_map, code_map);
    if (threadIdx.x >= kConsumerThreads) {
        run_producer<Forward, kTokens>(gemm, tile, x_map, code_map, barriers,
                                       kExact<kTokens> ? 1.0f : pair16_unscale<kDtype>(), shared);
        return;
    }
    take_registers<kConsumerRegisters>();
    if constexpr (kExact<kTokens>) {
        fill_pair32(shared, threadIdx.x, kConsumerThreads);
    } else {
        fill_pair16<kDtype>(shared, threadIdx.x, kConsumerThreads);
    }
    sync_part<2, kConsumerThreads>();
    ForwardConsumer<kDtype, kTokens> consumer(barriers, shared);
    if constexpr (kExact<kTokens>) {
        consume_exact<kStages>(tile.steps, consumer);
    } else {
        consume_promoted<kStages>(tile.steps, consumer);
    }

    // Nothing is in flight and no consumer reads a code any more: the tile takes the place of table and stages.
    sync_part<2, kConsumerThreads>();
    static_assert(kTokens * kRowPitch * 4 <= kSharedBytes<Forward, kTokens>);
    float* result = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
        const int token = (i >> 2) * 8 + accumulator_token(consumer.lane, i & 3);
        result[tile_index(token, consumer.warp * 16 + accumulator_row(consumer.lane, i & 3))] = consumer.sums[i];
    }
    sync_part<2, kConsumerThreads>();
#pragma unroll 1
    for (int piece = threadIdx.x; piece < kTokens * 32; piece += kConsumerThreads) {
        const int token = piece >> 5, out = (piece & 31) * 4;
        if (tile.first_token + token >= linear.rows || tile.first_column + out >= linear.out_features) continue;
        const float4 read = *reinterpret_cast<const float4*>(result + tile_index(token, out));
        float values[4] = {read.x, read.y, read.z, read.w};
        store_four<kDtype, false, true>(linear, blockIdx.y, tile.first_token + token, tile.first_column + out,
                                        linear.out_features, values);
    }
#endif
}

template <Dtype kDtype>
int launch_dtype(const CudaGemm& gemm, int device, void* stream) {
    return for_tile<16, 32, 64, 128, 256>(gemm.plan.tokens, [&](auto tokens) {
        constexpr int kTokens = decltype(tokens)::value;
        return launch_wgmma<Forward, kTokens, nf4_gemm_sm90<kDtype, kTokens>>(gemm, device, stream);
    });
}

}  // namespace
}  // namespace peftkern

extern "C" int peftkern::peftkern_cuda_nf4_gemm_sm90(const CudaGemm* gemm, int device, void* stream) {
    return gemm->linear.dtype == Dtype::kBFloat16 ? launch_dtype<Dtype::kBFloat16>(*gemm, device, stream)
                                                  : launch_dtype<Dtype::kFloat16>(*gemm, device, stream);
}
