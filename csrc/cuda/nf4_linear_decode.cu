// nf4_linear for 1 to 8 rows: codes stream to registers once, become 16-bit pairs by the table and meet x in mma.sync.
// nf4_decode_maps.h says which lane holds what.
#include "cuda/launch.h"
#include "cuda/nf4_decode_maps.h"

namespace peftkern {
namespace {

constexpr int kLanes = 32;
constexpr int kMostWarps = 16;
constexpr int kCodeWords = 4;  // of 8 codes: 16 bytes of a row
constexpr int kXWords = 16;    // of 2 values: the 32 elements of x beside them

template <Dtype kDtype>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kDtype == Dtype::kBFloat16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Read once: not kept in L1.
__device__ __forceinline__ void load_codes(uint32_t (&words)[kCodeWords], const uint8_t* from) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
}

// What a lane reads of a group: codes and scales of its two rows of each tile.
template <int kRowTiles>
struct Fetched {
    uint32_t codes[2 * kRowTiles][kCodeWords];
    float factor[2 * kRowTiles];  // fp32 absmax, or nested_absmax
    uint8_t byte[2 * kRowTiles];
};

// A lane's place in the weight. Rows behind the last are the last: they are read, but never stored.
template <int kRowTiles>
class Reader {
  public:
    __device__ Reader(const CudaLinear& task, int lane)
        : weight_(task.weight), lane_(lane), in_(task.in_features), last_row_(task.out_features - 1) {}

    __device__ void fetch(Fetched<kRowTiles>& to, int64_t first_row, int group) const {
        // Where the second half of the last group is missing, its lanes read the first; x is zero there.
        const int64_t half = int64_t{group} * kDecodeGroup + decode_half(lane_) * kDecodeHalf;
        const int missing = half < in_ ? 0 : kDecodeHalf;
        const int64_t column = int64_t{group} * kDecodeGroup + decode_first_element(lane_) - missing;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            const int64_t row = min(first_row + decode_weight_row(lane_) + 8 * i, last_row_);
            const int64_t e = row * in_ + column;
            load_codes(to.codes[i], weight_.codes + byte_of(e));
            const int64_t block = block_of(e, weight_.block_shift);
            if (weight_.nested_absmax) {
                to.byte[i] = __ldg(static_cast<const uint8_t*>(weight_.absmax) + block);
                to.factor[i] = __ldg(weight_.nested_absmax + (block >> kNestedBlockShift));
            } else {
                to.factor[i] = __ldg(static_cast<const float*>(weight_.absmax) + block);
            }
        }
    }

  private:
    const Nf4View& weight_;
    int lane_;
    int64_t in_, last_row_;
};

// The lane's 32 elements of the rows of x that it supplies, zeros where it supplies none.
template <int kMasks>
__device__ __forceinline__ void load_x(uint32_t (&words)[kMasks][kXWords], const CudaLinear& task, int group,
                                       int lane) {
    const int64_t column = int64_t{group} * kDecodeGroup + decode_first_element(lane);
#pragma unroll
    for (int mask = 0; mask < kMasks; ++mask) {
        const int row = mask * kDecodeMaskRows + decode_supplied_row(lane);
        const bool there = decode_supplies(lane) && row < task.rows && column < task.in_features;
        const auto* from =
            reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(task.x) + row * task.x_stride + column);
#pragma unroll
        for (int i = 0; i < kXWords / 4; ++i) {
            const uint4 four = there ? __ldg(from + i) : make_uint4(0, 0, 0, 0);
            words[mask][4 * i] = four.x, words[mask][4 * i + 1] = four.y;
            words[mask][4 * i + 2] = four.z, words[mask][4 * i + 3] = four.w;
        }
    }
}

struct Shared {
    unsigned char table[kPairTableBytes];
    float map[kNestedMapSize];
    float sums[1];  // [warps][rows of x][rows of the weight]
};

template <Dtype kDtype, int kMasks, int kRowTiles>
__global__ void __launch_bounds__(kMostWarps* kLanes) nf4_linear_decode(const CudaLinear task, const DecodePlan plan) {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    constexpr int kTileRows = kRowTiles * kDecodeTile, kXRows = kMasks * kDecodeMaskRows;
    const int threads = plan.warps * kLanes, thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
    const int warp = __shfl_sync(~0u, thread / kLanes, 0);  // the same in all lanes, and the compiler knows it
    const int groups = static_cast<int>((task.in_features + kDecodeGroup - 1) / kDecodeGroup);
    const int begin = static_cast<int>(blockIdx.y) * plan.split_groups + warp;
    const int end = min(static_cast<int>(blockIdx.y + 1) * plan.split_groups, groups);

    // The first codes are on their way while the table is filled.
    const Reader<kRowTiles> reader(task, lane);
    Fetched<kRowTiles> next;
    int64_t first_row = int64_t{blockIdx.x} * kTileRows;
    if (begin < end) reader.fetch(next, first_row, begin);
    fill_pair16<kDtype>(shared.table, thread, threads);
    float offset = 0.0f;
    if (task.weight.nested_absmax) {
        offset = __ldg(task.weight.offset);
        for (int i = thread; i < kNestedMapSize; i += threads) shared.map[i] = __ldg(task.weight.nested_quant_map + i);
    }
    __syncthreads();

    const uint32_t lane_offset = pair_lane_offset<4>(lane);
    const int64_t stride = int64_t{gridDim.x} * kTileRows;
    for (; first_row < task.out_features; first_row += stride) {
        float sums[kRowTiles][kMasks][4] = {};
#pragma unroll 1
        for (int group = begin; group < end; group += plan.warps) {
            const Fetched<kRowTiles> now = next;
            if (group + plan.warps < end)
                reader.fetch(next, first_row, group + plan.warps);
            else if (first_row + stride < task.out_features)
                reader.fetch(next, first_row + stride, begin);
            uint32_t x[kMasks][kXWords];
            load_x(x, task, group, lane);
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
                float products[kMasks][4] = {};
#pragma unroll
                for (int j = 0; j < kDecodeProducts; ++j) {
                    uint32_t a[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const uint32_t word = now.codes[2 * tile + (i & 1)][j >> 1];
                        const uint32_t at = pair_address(word, (j & 1) * 2 + (i >> 1), lane_offset);
                        a[i] = *reinterpret_cast<const uint32_t*>(shared.table + at);
                    }
#pragma unroll
                    for (int mask = 0; mask < kMasks; ++mask)
                        multiply_add<kDtype>(products[mask], a, x[mask][2 * j], x[mask][2 * j + 1]);
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float scale = now.factor[2 * tile + i];
                    if (task.weight.nested_absmax)
                        scale = nested_scale(shared.map[now.byte[2 * tile + i]], scale, offset);
                    scale *= pair16_unscale<kDtype>();
#pragma unroll
                    for (int mask = 0; mask < kMasks; ++mask) {
                        sums[tile][mask][2 * i] += scale * products[mask][2 * i];
                        sums[tile][mask][2 * i + 1] += scale * products[mask][2 * i + 1];
                    }
                }
            }
        }

        // The halves of a group lie in lanes 2 apart; then the warps' sums are added in the order of the warps.
        float* mine = shared.sums + warp * kXRows * kTileRows;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
            for (int mask = 0; mask < kMasks; ++mask) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = sums[tile][mask][i];
                    sum += __shfl_xor_sync(~0u, sum, 2);
                    const int row = mask * kDecodeMaskRows + decode_summed_row(lane, i & 1);
                    const int weight_row = tile * kDecodeTile + decode_weight_row(lane) + (i >> 1) * 8;
                    if (decode_half(lane) == 0) mine[row * kTileRows + weight_row] = sum;
                }
            }
        }
        __syncthreads();
#if __CUDA_ARCH__ >= 900
        // Until here nothing depends on the kernel before, which computes h.
        asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
        for (int i = thread; i < task.rows * kTileRows; i += threads) {
            const int row = i / kTileRows;
            const int64_t weight_row = first_row + i % kTileRows;
            if (weight_row >= task.out_features) continue;
            float sum = 0.0f;
            for (int w = 0; w < plan.warps; ++w) sum += shared.sums[w * kXRows * kTileRows + i];
            const int64_t at = row * task.out_features + weight_row;
            if (plan.splits > 1)
                task.partials[blockIdx.y * task.rows * task.out_features + at] = sum;
            else
                static_cast<uint16_t*>(task.y)[at] = half_of_float<kDtype>(finish(task.epilogue, sum, row, weight_row));
        }
        __syncthreads();
    }
}

template <Dtype kDtype, int kMasks, int kRowTiles>
cudaError_t launch_tiles(const CudaLinear& task, const DecodePlan& plan, int device, cudaStream_t stream) {
    constexpr auto kernel = nf4_linear_decode<kDtype, kMasks, kRowTiles>;
    constexpr int kWarpSums = kMasks * kDecodeMaskRows * kRowTiles * kDecodeTile * static_cast<int>(sizeof(float));
    constexpr int kFixedBytes = offsetof(Shared, sums);
    cudaError_t error = opt_in_shared<kernel>(device, kFixedBytes + kMostWarps * kWarpSums);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(plan.ctas), static_cast<unsigned>(plan.splits));
    const dim3 block(static_cast<unsigned>(plan.warps * kLanes));
    const LaunchShape shape{grid, block, kFixedBytes + plan.warps * kWarpSums, stream, task.epilogue.h != nullptr};
    return launch<kernel>(shape, task, plan);
}

template <Dtype kDtype>
cudaError_t launch_dtype(const CudaLinear& task, const DecodePlan& plan, int device, cudaStream_t stream) {
    if (task.rows <= kDecodeMaskRows)
        return plan.row_tiles == 1 ? launch_tiles<kDtype, 1, 1>(task, plan, device, stream)
                                   : launch_tiles<kDtype, 1, 2>(task, plan, device, stream);
    return plan.row_tiles == 1 ? launch_tiles<kDtype, 2, 1>(task, plan, device, stream)
                               : launch_tiles<kDtype, 2, 2>(task, plan, device, stream);
}

}  // namespace
}  // namespace peftkern

int peftkern::peftkern_cuda_nf4_linear_decode(const CudaLinear* task, const DecodePlan* plan, int device,
                                              void* stream) {
    if (task->rows == 0 || task->out_features == 0) return cudaSuccess;
    if (task->rows > kDecodeRows || task->dtype == Dtype::kFloat32) return cudaErrorInvalidValue;
    const cudaError_t error = task->dtype == Dtype::kBFloat16
                                  ? launch_dtype<Dtype::kBFloat16>(*task, *plan, device, stream_of(stream))
                                  : launch_dtype<Dtype::kFloat16>(*task, *plan, device, stream_of(stream));
    if (error != cudaSuccess || plan->splits == 1) return error;
    const CudaSplitSum sum{task->partials, plan->splits, task->rows, task->out_features,
                           task->epilogue, task->y,      task->dtype};
    return peftkern_cuda_split_sum(&sum, stream);
}
