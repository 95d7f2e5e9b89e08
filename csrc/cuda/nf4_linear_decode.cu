// nf4_linear for 1 to 8 rows: codes stream to registers once, become 16-bit pairs by the table and meet x in mma.sync.
// nf4_decode_maps.h says which lane holds what.
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/mma_sm80.h"
#include "cuda/nf4_decode_maps.h"
#include "cuda/ptx.h"

namespace peftkern {
namespace {

constexpr int kLanes = 32;
constexpr int kCodeWords = 4;  // of 8 codes: 16 bytes of a row
constexpr int kXWords = 16;    // of 2 values: the 32 elements of x beside them
constexpr int kChunk = 32;     // elements of those 16 bytes

// The groups of a warp, the same in every tile of its CTA.
struct Walk {
    int begin, end, step;
};

// What a lane reads of a group: codes and scales of its two rows of each tile.
template <int kRowTiles>
struct Fetched {
    uint32_t codes[2 * kRowTiles][kCodeWords];
    float factor[2 * kRowTiles];  // fp32 absmax, or nested_absmax
    uint8_t byte[2 * kRowTiles];
};

// Reads a lane's part of groups. What the address of a group needs beside the group is made once for a tile, and within
// a tile 32-bit offsets do.
template <int kRowTiles, bool kNested>
class Reader {
  public:
    __device__ Reader(const CudaLinear& task, int64_t first_row, int lane)
        : task_(task), lane_(lane), row_chunks_(static_cast<unsigned>(task.in_features) / kChunk) {
        enter_tile(first_row);
    }

    __device__ void enter_tile(int64_t first_row) {
        const int block_shift = task_.weight.block_shift;
        const int64_t first_block = block_of(first_row * task_.in_features, block_shift);
        // Scale bytes are counted from the nested block's first one.
        const int64_t nested_block = first_block >> kNestedBlockShift;
        const int64_t first_scale = kNested ? nested_block << kNestedBlockShift : first_block;
        codes_ = reinterpret_cast<const uint4*>(task_.weight.codes) + first_row * row_chunks_;
        scales_ = static_cast<const Scale*>(task_.weight.absmax) + first_scale;
        if constexpr (kNested) nested_absmax_ = task_.weight.nested_absmax + nested_block;
        // Rows behind the last are the last: they are read, but never stored.
        const int64_t last = task_.out_features - 1 - first_row;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            const int row = decode_weight_row(lane_) + 8 * i;
            const auto clamped = static_cast<unsigned>(row < last ? row : last);
            first_chunk_[i] = clamped * row_chunks_;
            first_scale_[i] = clamped * (static_cast<unsigned>(task_.in_features) >> block_shift) +
                              static_cast<unsigned>(first_block - first_scale);
        }
    }

    __device__ void fetch(Fetched<kRowTiles>& to, int group) const {
        // Where the second half of the last group is missing, its lanes read the first; x is zero there.
        const unsigned chunk =
            min(static_cast<unsigned>(group * (kDecodeGroup / kChunk) + (lane_ & 3)), row_chunks_ - 1);
        const unsigned block = chunk * kChunk >> task_.weight.block_shift;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            load_streaming(to.codes[i], codes_ + (first_chunk_[i] + chunk));
            const unsigned at = first_scale_[i] + block;
            if constexpr (kNested) {
                to.byte[i] = __ldg(scales_ + at);
                to.factor[i] = __ldg(nested_absmax_ + (at >> kNestedBlockShift));
            } else {
                to.factor[i] = __ldg(scales_ + at);
            }
        }
    }

  private:
    using Scale = std::conditional_t<kNested, uint8_t, float>;

    const CudaLinear& task_;
    int lane_;
    unsigned row_chunks_;
    const uint4* codes_;
    const Scale* scales_;
    const float* nested_absmax_;
    unsigned first_chunk_[2 * kRowTiles], first_scale_[2 * kRowTiles];
};

// A lane's 32 elements of a group in the rows of x that it supplies. Elsewhere it supplies zeros, which are written
// once: no load ever reaches them.
template <int kMasks>
class XReader {
  public:
    uint32_t words[kMasks][kXWords] = {};

    __device__ XReader(const CudaLinear& task, int lane)
        : in_features_(static_cast<int>(task.in_features)), first_element_(decode_first_element(lane)) {
#pragma unroll
        for (int mask = 0; mask < kMasks; ++mask) {
            const int row = mask * kDecodeMaskRows + decode_supplied_row(lane);
            supplies_[mask] = decode_supplies(lane) && row < task.rows;
            from_[mask] = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(task.x) + row * task.x_stride +
                                                         first_element_);
        }
    }

    __device__ void fetch(int group) {
#pragma unroll
        for (int mask = 0; mask < kMasks; ++mask) {
            if (!supplies_[mask]) continue;
            const uint4* from = from_[mask] + group * (kDecodeGroup / 8);
#pragma unroll
            for (int i = 0; i < kXWords; i += 4) {
                const uint4 four = __ldg(from + i / 4);
                words[mask][i] = four.x, words[mask][i + 1] = four.y;
                words[mask][i + 2] = four.z, words[mask][i + 3] = four.w;
            }
        }
    }

    // The same, where the group's second half may be missing.
    __device__ void fetch_last(int group) {
        if (group * kDecodeGroup + first_element_ < in_features_) {
            fetch(group);
            return;
        }
#pragma unroll
        for (int i = 0; i < kMasks * kXWords; ++i) words[i / kXWords][i % kXWords] = 0;
    }

  private:
    int in_features_, first_element_;
    const uint4* from_[kMasks];
    bool supplies_[kMasks];
};

struct Shared {
    unsigned char table[kPairTableBytes];
    float map[kNestedMapSize];
    float sums[1];  // [warps][rows of x][rows of the weight]
};

// Adds a group's products, each block's by its scale; the codebook's own scale waits for the end.
template <Dtype kDtype, int kMasks, int kRowTiles, bool kNested>
__device__ __forceinline__ void multiply_group(float (&sums)[kRowTiles][kMasks][4], const Fetched<kRowTiles>& group,
                                               const uint32_t (&x)[kMasks][kXWords], const Shared& shared,
                                               uint32_t lane_offset, float offset) {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
        float products[kMasks][4] = {};
#pragma unroll
        for (int j = 0; j < kDecodeProducts; ++j) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t word = group.codes[2 * tile + (i & 1)][j >> 1];
                const uint32_t at = pair_address(word, (j & 1) * 2 + (i >> 1), lane_offset);
                a[i] = *reinterpret_cast<const uint32_t*>(shared.table + at);
            }
#pragma unroll
            for (int mask = 0; mask < kMasks; ++mask)
                multiply_add<kDtype>(products[mask], a, x[mask][2 * j], x[mask][2 * j + 1]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float scale = group.factor[2 * tile + i];
            if constexpr (kNested) scale = nested_scale(shared.map[group.byte[2 * tile + i]], scale, offset);
#pragma unroll
            for (int mask = 0; mask < kMasks; ++mask) {
                sums[tile][mask][2 * i] += scale * products[mask][2 * i];
                sums[tile][mask][2 * i + 1] += scale * products[mask][2 * i + 1];
            }
        }
    }
}

// Adds a lane's share of the low-rank part, the ranks from `first` on by `step`, to the sums of its rows: loads of many
// ranks are on their way at once.
template <int kMasks, int kRowTiles>
__device__ __forceinline__ void add_low_rank(float (&sums)[kRowTiles][kMasks][4], const CudaLinear& task,
                                             int64_t first_row, int lane, int first, int step) {
    const Epilogue& epilogue = task.epilogue;
#pragma unroll 1
    for (int r = first; r < epilogue.rank; r += step) {
        float b[kRowTiles][2], h[kMasks][2];
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            const int64_t weight_row = first_row + decode_weight_row(lane) + 8 * i;
            const bool there = weight_row < task.out_features;
            const int64_t at = weight_row * epilogue.rank + r;
            b[i / 2][i % 2] = there ? load_element(epilogue.lora_b, epilogue.lora_b_dtype, at) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 2 * kMasks; ++i) {
            const int row = i / 2 * kDecodeMaskRows + decode_summed_row(lane, i % 2);
            h[i / 2][i % 2] = row < task.rows ? epilogue.h_scale * epilogue.h[row * int64_t{epilogue.rank} + r] : 0.0f;
        }
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
            for (int mask = 0; mask < kMasks; ++mask)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[tile][mask][i] += h[mask][i & 1] * b[tile][i >> 1];
    }
}

template <Dtype kDtype, int kMasks, int kRowTiles, bool kNested>
__global__ void __launch_bounds__(kDecodeMostWarps* kLanes, 1)
    nf4_linear_decode(const CudaLinear task, const DecodePlan plan) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    constexpr int kTileRows = kRowTiles * kDecodeTile, kXRows = kMasks * kDecodeMaskRows;
    const int threads = plan.warps * kLanes, thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
    const int warp = __shfl_sync(~0u, thread / kLanes, 0);  // the same in all lanes, and the compiler knows it
    const int groups = static_cast<int>((task.in_features + kDecodeGroup - 1) / kDecodeGroup);
    const int split = static_cast<int>(blockIdx.y) * plan.split_groups;
    const Walk walk{split + warp, min(split + plan.split_groups, groups), plan.warps};
    const int64_t row_step = int64_t{gridDim.x} * kTileRows;
    int64_t first_row = int64_t{blockIdx.x} * kTileRows;

    // The first codes are on their way while the table is filled.
    Reader<kRowTiles, kNested> reader(task, first_row, lane);
    Fetched<kRowTiles> next;
    if (walk.begin < walk.end) reader.fetch(next, walk.begin);
    fill_pair16<kDtype>(shared.table, thread, threads);
    float offset = 0.0f;
    if constexpr (kNested) {
        offset = __ldg(task.weight.offset);
        for (int i = thread; i < kNestedMapSize; i += threads) shared.map[i] = __ldg(task.weight.nested_quant_map + i);
    }
    __syncthreads();

    const uint32_t lane_offset = pair_lane_offset<4>(lane);
    XReader<kMasks> x(task, lane);
    for (; first_row < task.out_features; first_row += row_step) {
        float sums[kRowTiles][kMasks][4] = {};
        const auto multiply = [&](const Fetched<kRowTiles>& group) {
            multiply_group<kDtype, kMasks, kRowTiles, kNested>(sums, group, x.words, shared, lane_offset, offset);
        };
        if (walk.begin < walk.end) {
            int group = walk.begin;
#pragma unroll 1
            for (; group + walk.step < walk.end; group += walk.step) {
                const Fetched<kRowTiles> now = next;
                reader.fetch(next, group + walk.step);
                x.fetch(group);
                multiply(now);
            }
            // The last: the first of the next tile is fetched beside it.
            const Fetched<kRowTiles> now = next;
            if (first_row + row_step < task.out_features) {
                reader.enter_tile(first_row + row_step);
                reader.fetch(next, walk.begin);
            }
            x.fetch_last(group);
            multiply(now);
        }

#pragma unroll
        for (int i = 0; i < kRowTiles * kMasks * 4; ++i)
            sums[i / (kMasks * 4)][i / 4 % kMasks][i % 4] *= pair16_unscale<kDtype>();
        // Until here nothing depends on the kernel before, which may compute h.
        wait_for_previous_kernel();
        if (task.epilogue.h && blockIdx.y == 0)
            add_low_rank<kMasks, kRowTiles>(sums, task, first_row, lane, 2 * warp + decode_half(lane), 2 * plan.warps);

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
                static_cast<uint16_t*>(task.y)[at] =
                    half_of_float<kDtype>(finish(without_low_rank(task.epilogue), sum, row, weight_row));
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
    bool overlaps = task.epilogue.h != nullptr;
    if (overlaps && (error = waits_for_predecessor<kernel>(device, &overlaps)) != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(plan.ctas), static_cast<unsigned>(plan.splits));
    const dim3 block(static_cast<unsigned>(plan.warps * kLanes));
    const LaunchShape shape{grid, block, kFixedBytes + plan.warps * kWarpSums, stream, overlaps};
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
    const CudaSplitSum sum{
        task->partials, plan->splits, task->rows, task->out_features, without_low_rank(task->epilogue),
        task->y,        task->dtype};
    return peftkern_cuda_split_sum(&sum, stream);
}
