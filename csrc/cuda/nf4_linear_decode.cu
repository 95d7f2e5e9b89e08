// nf4_linear for 1 to 8 rows: codes stream to registers once, become 16-bit pairs by the table and meet x in mma.sync.
// nf4_decode_maps.h says which lane holds what.
#include "cuda/launch.h"
#include "cuda/mma_sm80.h"
#include "cuda/nf4_decode_maps.h"
#include "cuda/ptx.h"

namespace peftkern {
namespace {

constexpr int kLanes = 32;
constexpr int kCodeWords = 4;  // of 8 codes: 16 bytes of a row
constexpr int kXWords = 16;    // of 2 values: the 32 elements of x beside them

// The groups of a warp in every tile, and the tiles of its CTA.
struct Walk {
    int begin, end, step;
    int64_t first_row, row_step;
};

// What a lane reads of a group: codes and scales of its two rows of each tile.
template <int kRowTiles>
struct Fetched {
    uint32_t codes[2 * kRowTiles][kCodeWords];
    float factor[2 * kRowTiles];  // fp32 absmax, or nested_absmax
    uint8_t byte[2 * kRowTiles];
};

// Walks a lane through the groups of its warp, tile by tile. Within a tile 32-bit offsets do.
template <int kRowTiles, bool kNested>
class Reader {
  public:
    __device__ Reader(const CudaLinear& task, const Walk& walk, int lane)
        : task_(task), walk_(walk), lane_(lane), group_(walk.begin), first_row_(walk.first_row) {
        enter_tile();
    }

    // Reads the lane's part of the group and goes to the next one. At the end it stays: that group is read once more.
    __device__ void fetch(Fetched<kRowTiles>& to) {
        // Where the second half of the last group is missing, its lanes read the first; x is zero there.
        int column = group_ * kDecodeGroup + decode_half(lane_) * kDecodeHalf;
        if (column >= task_.in_features) column -= kDecodeHalf;
        const unsigned byte = static_cast<unsigned>(column) / 2 + (lane_ & 1) * (kDecodeHalf / 4);
        const unsigned block = static_cast<unsigned>(column) >> task_.weight.block_shift;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            const unsigned row = min(static_cast<unsigned>(decode_weight_row(lane_) + 8 * i), last_row_);
            load_streaming(to.codes[i], codes_ + (row * row_bytes() + byte));
            const unsigned at = row * row_blocks() + block;
            if constexpr (kNested) {
                to.byte[i] = __ldg(static_cast<const uint8_t*>(task_.weight.absmax) + first_block_ + at);
                to.factor[i] = __ldg(nested_absmax_ + ((in_nested_block_ + at) >> kNestedBlockShift));
            } else {
                to.factor[i] = __ldg(static_cast<const float*>(task_.weight.absmax) + first_block_ + at);
            }
        }
        if (group_ + walk_.step < walk_.end) {
            group_ += walk_.step;
        } else if (first_row_ + walk_.row_step < task_.out_features) {
            group_ = walk_.begin;
            first_row_ += walk_.row_step;
            enter_tile();
        }
    }

  private:
    __device__ unsigned row_bytes() const { return static_cast<unsigned>(task_.in_features / 2); }
    __device__ unsigned row_blocks() const {
        return static_cast<unsigned>(task_.in_features >> task_.weight.block_shift);
    }
    __device__ void enter_tile() {
        const int64_t e = first_row_ * task_.in_features;
        codes_ = task_.weight.codes + byte_of(e);
        first_block_ = block_of(e, task_.weight.block_shift);
        nested_absmax_ = task_.weight.nested_absmax + (first_block_ >> kNestedBlockShift);
        in_nested_block_ = static_cast<unsigned>(first_block_) & ((1u << kNestedBlockShift) - 1);
        // Rows behind the last are the last: they are read, but never stored.
        const int64_t last = task_.out_features - 1 - first_row_;
        last_row_ = static_cast<unsigned>(last < kRowTiles * kDecodeTile ? last : kRowTiles * kDecodeTile);
    }

    const CudaLinear& task_;
    const Walk& walk_;
    int lane_, group_;
    int64_t first_row_, first_block_;
    const uint8_t* codes_;
    const float* nested_absmax_;
    unsigned in_nested_block_, last_row_;
};

// The lane's 32 elements of the rows of x that it supplies, zeros where it supplies none.
template <int kMasks>
__device__ __forceinline__ void load_x(uint32_t (&words)[kMasks][kXWords], const CudaLinear& task, int group,
                                       int lane) {
    const int column = group * kDecodeGroup + decode_first_element(lane);
#pragma unroll
    for (int mask = 0; mask < kMasks; ++mask) {
        const int row = mask * kDecodeMaskRows + decode_supplied_row(lane);
        const bool there = decode_supplies(lane) && row < task.rows && column < task.in_features;
        const auto* from = static_cast<const uint16_t*>(task.x) + row * task.x_stride + column;
#pragma unroll
        for (int i = 0; i < kXWords; i += 4) {
            uint4 four = make_uint4(0, 0, 0, 0);
            if (there) four = __ldg(reinterpret_cast<const uint4*>(from) + i / 4);
            words[mask][i] = four.x, words[mask][i + 1] = four.y;
            words[mask][i + 2] = four.z, words[mask][i + 3] = four.w;
        }
    }
}

struct Shared {
    unsigned char table[kPairTableBytes];
    float map[kNestedMapSize];
    float sums[1];  // [warps][rows of x][rows of the weight]
};

template <Dtype kDtype, int kMasks, int kRowTiles, bool kNested>
__global__ void __launch_bounds__(kDecodeMostWarps* kLanes, 1)
    nf4_linear_decode(const CudaLinear task, const DecodePlan plan) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    constexpr int kTileRows = kRowTiles * kDecodeTile, kXRows = kMasks * kDecodeMaskRows;
    const int threads = plan.warps * kLanes, thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
    const int warp = __shfl_sync(~0u, thread / kLanes, 0);  // the same in all lanes, and the compiler knows it
    const int groups = static_cast<int>((task.in_features + kDecodeGroup - 1) / kDecodeGroup);
    const int split = static_cast<int>(blockIdx.y) * plan.split_groups;
    const Walk walk{split + warp, min(split + plan.split_groups, groups), plan.warps, int64_t{blockIdx.x} * kTileRows,
                    int64_t{gridDim.x} * kTileRows};

    // The first codes are on their way while the table is filled.
    Reader<kRowTiles, kNested> reader(task, walk, lane);
    Fetched<kRowTiles> next;
    if (walk.begin < walk.end) reader.fetch(next);
    fill_pair16<kDtype>(shared.table, thread, threads);
    float offset = 0.0f;
    if constexpr (kNested) {
        offset = __ldg(task.weight.offset);
        for (int i = thread; i < kNestedMapSize; i += threads) shared.map[i] = __ldg(task.weight.nested_quant_map + i);
    }
    __syncthreads();

    const uint32_t lane_offset = pair_lane_offset<4>(lane);
    for (int64_t first_row = walk.first_row; first_row < task.out_features; first_row += walk.row_step) {
        float sums[kRowTiles][kMasks][4] = {};
#pragma unroll 1
        for (int group = walk.begin; group < walk.end; group += walk.step) {
            const Fetched<kRowTiles> now = next;
            reader.fetch(next);
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
                    if constexpr (kNested) scale = nested_scale(shared.map[now.byte[2 * tile + i]], scale, offset);
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
        // Until here nothing depends on the kernel before, which may compute h.
        wait_for_previous_kernel();
#pragma unroll 1
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

template <Dtype kDtype, int kMasks, int kRowTiles, bool kNested>
cudaError_t launch_tiles(const CudaLinear& task, const DecodePlan& plan, int device, cudaStream_t stream) {
    constexpr auto kernel = nf4_linear_decode<kDtype, kMasks, kRowTiles, kNested>;
    constexpr int kWarpSums = kMasks * kDecodeMaskRows * kRowTiles * kDecodeTile * static_cast<int>(sizeof(float));
    constexpr int kFixedBytes = offsetof(Shared, sums);
    cudaError_t error = opt_in_shared<kernel>(device, kFixedBytes + kDecodeMostWarps * kWarpSums);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(plan.ctas), static_cast<unsigned>(plan.splits));
    const dim3 block(static_cast<unsigned>(plan.warps * kLanes));
    const LaunchShape shape{grid, block, kFixedBytes + plan.warps * kWarpSums, stream, task.epilogue.h != nullptr};
    return launch<kernel>(shape, task, plan);
}

template <Dtype kDtype, bool kNested>
cudaError_t launch_scales(const CudaLinear& task, const DecodePlan& plan, int device, cudaStream_t stream) {
    if (task.rows > kDecodeMaskRows) return launch_tiles<kDtype, 2, 1, kNested>(task, plan, device, stream);
    return plan.row_tiles == 1 ? launch_tiles<kDtype, 1, 1, kNested>(task, plan, device, stream)
                               : launch_tiles<kDtype, 1, 2, kNested>(task, plan, device, stream);
}

template <Dtype kDtype>
cudaError_t launch_dtype(const CudaLinear& task, const DecodePlan& plan, int device, cudaStream_t stream) {
    return task.weight.nested_absmax ? launch_scales<kDtype, true>(task, plan, device, stream)
                                     : launch_scales<kDtype, false>(task, plan, device, stream);
}

}  // namespace
}  // namespace peftkern

int peftkern::peftkern_cuda_nf4_linear_decode(const CudaLinear* task, const DecodePlan* plan, int device,
                                              void* stream) {
    if (task->rows == 0 || task->out_features == 0) return cudaSuccess;
    const int most_tiles = task->rows > kDecodeMaskRows ? 1 : 2;
    if (task->rows > kDecodeRows || task->dtype == Dtype::kFloat32 || plan->row_tiles > most_tiles)
        return cudaErrorInvalidValue;
    const cudaError_t error = task->dtype == Dtype::kBFloat16
                                  ? launch_dtype<Dtype::kBFloat16>(*task, *plan, device, stream_of(stream))
                                  : launch_dtype<Dtype::kFloat16>(*task, *plan, device, stream_of(stream));
    if (error != cudaSuccess || plan->splits == 1) return error;
    const CudaSplitSum sum{task->partials, plan->splits, task->rows, task->out_features,
                           task->epilogue, task->y,      task->dtype};
    return peftkern_cuda_split_sum(&sum, stream);
}
