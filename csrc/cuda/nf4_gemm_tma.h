// What the two wgmma kernels share: the ring's barriers, the producer warpgroup, the consumers' waits, the launch.
#pragma once

#include "cuda/nf4_gemm_device.h"
#include "cuda/nf4_gemm_launch.h"
#include "cuda/nf4_gemm_schedule.h"
#include "cuda/ptx.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma_sm90.h"

namespace peftkern {

// 8 KB of codes and the tokens in flight hide the latency of memory; the table, the barriers and the stages stay below
// 227 KB.
template <class Shape, int kTokens>
constexpr int kStagesOf = kTokens <= 32    ? 6
                          : kTokens == 64  ? 5
                          : kTokens == 128 ? (Shape::kStep == 64 ? 4 : 3)
                                           : 2;
template <class Shape, int kTokens>
constexpr int kSharedBytes = kStagesOffsetSm90 + kStagesOf<Shape, kTokens> * Shape::template kBytes<kTokens>;

constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
constexpr int kConsumerWarps = 8;
constexpr int kConsumerThreads = 256, kProducerThreads = 128;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// One 8-byte barrier a stage and kind. Full: the producer's threads (scales) and its announcement of TMA's bytes.
// Empty: every consumer warp, since each reads codes and scales of its own.
template <int kStages>
struct Barriers {
    uint32_t base;

    __device__ uint32_t full(int slot) const { return base + slot * 8; }
    __device__ uint32_t empty(int slot) const { return base + (kStages + slot) * 8; }
    __device__ void init() const {
        for (int slot = 0; slot < kStages; ++slot) {
            init_barrier(full(slot), kProducerThreads + 1);
            init_barrier(empty(slot), kConsumerWarps);
        }
        publish_barriers();
    }
};

// Once, by all threads, before anything waits.
template <int kStages>
__device__ __forceinline__ Barriers<kStages> start_ring(unsigned char* shared, const CUtensorMap& x_map,
                                                        const CUtensorMap& code_map) {
    const Barriers<kStages> barriers{shared_address(shared + kBarrierOffset)};
    if (threadIdx.x == 0) barriers.init();
    if (threadIdx.x == kConsumerThreads) {
        prefetch_map(x_map);
        prefetch_map(code_map);
    }
    __syncthreads();
    return barriers;
}

template <class Shape, int kTokens>
struct Producer {
    static constexpr int kStages = kStagesOf<Shape, kTokens>;

    const Boxes<Shape, kTokens>& boxes;
    const ScaleReader& reader;
    const CUtensorMap& x_map;
    const CUtensorMap& code_map;
    Barriers<kStages> barriers;
    unsigned char* stages;
    RawScale raw[kScaleLead][2] = {};

    __device__ void wait_empty(int slot, uint32_t parity) { wait_phase(barriers.empty(slot), parity); }
    __device__ void fetch_scales(int lead, int step) {
        raw[lead][0] = reader.fetch(boxes.scale(step, 0));
        raw[lead][1] = reader.fetch(boxes.scale(step, 1));
    }
    __device__ void fill(int slot, int step, int lead) {
        unsigned char* stage = stages + slot * Shape::template kBytes<kTokens>;
        const uint32_t barrier = barriers.full(slot);
        if (threadIdx.x == kConsumerThreads) {
            arrive_expecting(barrier, Boxes<Shape, kTokens>::kCopyBytes);
            boxes.copy(step, [&](Operand operand, int to, int column, int row) {
                load_box(shared_address(stage) + to, operand == Operand::kTokens ? x_map : code_map, column, row,
                         barrier);
            });
        }
        float* scales = reinterpret_cast<float*>(stage + Shape::template kScalesAt<kTokens>);
        scales[boxes.place(0)] = reader.decode(raw[lead][0]);
        scales[boxes.place(1)] = reader.decode(raw[lead][1]);
        arrive(barrier);
    }
};

// All that the producer warpgroup does; scales are `scale_factor` times the weight's.
template <class Shape, int kTokens>
__device__ __forceinline__ void run_producer(const CudaGemm& gemm, const Tile& tile, const CUtensorMap& x_map,
                                             const CUtensorMap& code_map, Barriers<kStagesOf<Shape, kTokens>> barriers,
                                             float scale_factor, unsigned char* shared) {
    give_registers<kProducerRegisters>();
    const CudaLinear& linear = gemm.linear;
    const int thread = threadIdx.x - kConsumerThreads;
    float* map = reinterpret_cast<float*>(shared + kMapOffset);
    fill_map(map, linear.weight, thread, kProducerThreads);
    sync_part<1, kProducerThreads>();
    const ScaleReader reader(linear.weight, map, scale_factor);
    const Boxes<Shape, kTokens> boxes(linear, tile, thread);
    Producer<Shape, kTokens> producer{boxes, reader, x_map, code_map, barriers, shared + kStagesOffsetSm90};
    produce<kStagesOf<Shape, kTokens>>(tile.steps, producer);
}

// The waits of a consumer; the kernels add decode, multiply and promote.
template <class Shape, int kTokens>
struct Consumer {
    static constexpr int kStages = kStagesOf<Shape, kTokens>;
    static constexpr int kStageBytes = Shape::template kBytes<kTokens>;

    Barriers<kStages> barriers;
    const unsigned char* table;
    const unsigned char* stages;
    uint64_t first_descriptor;
    int lane, warp;  // of the eight

    __device__ Consumer(Barriers<kStages> barriers, const unsigned char* shared)
        : barriers(barriers),
          table(shared),
          stages(shared + kStagesOffsetSm90),
          first_descriptor(token_descriptor(shared_address(stages))),
          lane(__shfl_sync(0xffffffffu, threadIdx.x & 31, threadIdx.x & 31)),
          warp(__shfl_sync(0xffffffffu, threadIdx.x >> 5, 0)) {}

    __device__ void wait_full(int slot, uint32_t parity) { wait_phase(barriers.full(slot), parity); }
    __device__ void release(int slot) {
        __syncwarp();
        if (lane == 0) arrive(barriers.empty(slot));
    }
    // Of `bytes`, a multiple of 16, into a stage: only the address in the low half changes, and cannot overflow.
    __device__ uint64_t descriptor(int slot, int bytes) const {
        const uint32_t low = static_cast<uint32_t>(first_descriptor) + slot * (kStageBytes / 16) + bytes / 16;
        return first_descriptor >> 32 << 32 | low;
    }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <class Shape, int kTokens, auto kernel>
int launch_wgmma(const CudaGemm& gemm, int device, void* stream) {
    static_assert(kSharedBytes<Shape, kTokens> <= 227 * 1024);
    const CudaLinear& linear = gemm.linear;
    // Of the weight, which lies in rows of out, whichever of its sides is contracted.
    constexpr int kCodeRows = Shape::kBackward ? Shape::kStep : Shape::kTile;
    constexpr int kCodeColumns = Shape::kBackward ? Shape::kTile : Shape::kStep;
    // The driver's encoder wants a current context, which a thread that has launched nothing yet, such as autograd's,
    // need not have: unlike a launch it makes none.
    if (const cudaError_t error = cudaSetDevice(device)) return cudaGetLastError(), error;
    CUtensorMap x_map, code_map;
    if (const int error = encode_tokens(&x_map, linear, depth_of<Shape>(linear), kTokens)) return error;
    if (const int error = encode_codes(&code_map, linear, kCodeRows, kCodeColumns / 2)) return error;
    return launch_tiles<kernel>(gemm, columns_of<Shape>(linear), Shape::kTile, kThreadsSm90,
                                kSharedBytes<Shape, kTokens>, device, stream, x_map, code_map, gemm);
}

}  // namespace peftkern
