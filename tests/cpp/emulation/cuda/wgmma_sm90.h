// csrc/cuda/wgmma_sm90.h on the host. Boxes arrive when somebody waits, and products are made when they are waited for,
// from what registers and shared memory hold then: what is overwritten too early shows.
#pragma once

#include <cuda.h>

#include "cuda/mma_sm80.h"

#define __CUDA_ARCH_FEAT_SM90_ALL

namespace peftkern {

struct EmulatedBarrier {
    int expected = 0, pending = 0, bytes = 0;
    uint32_t phase = 0;

    void settle() {
        if (pending < 0) abort();
        if (pending == 0 && bytes == 0) phase ^= 1, pending = expected;
    }
};
inline std::map<uint32_t, EmulatedBarrier> barriers_at;

struct AsyncBox {
    uint32_t to;
    const CUtensorMap* map;
    int x, y;
    uint32_t barrier;
};
inline std::deque<AsyncBox> async_boxes;

inline void init_barrier(uint32_t barrier, int arrivals) {
    if (barrier % 8) abort();
    barriers_at[barrier] = {arrivals, arrivals, 0, 0};
}
inline void publish_barriers() {}
inline void prefetch_map(const CUtensorMap&) {}
inline void arrive(uint32_t barrier) {
    EmulatedBarrier& at = barriers_at.at(barrier);
    --at.pending;
    at.settle();
}
inline void arrive_expecting(uint32_t barrier, int bytes) {
    barriers_at.at(barrier).bytes += bytes;
    arrive(barrier);
}

inline void load_box(uint32_t to, const CUtensorMap& map, int x, int y, uint32_t barrier) {
    if (to % 1024) abort();
    async_boxes.push_back({to, &map, x, y, barrier});
}
// The swizzle of `width` bytes folds address bits from 7 on into the bits from 4 on; outside is zeros.
inline void land(const AsyncBox& box) {
    const CUtensorMap& map = *box.map;
    const uint32_t fold = map.swizzle == 128 ? 7 : 3;
    for (uint32_t row = 0; row < map.box_rows; ++row)
        for (uint32_t byte = 0; byte < map.box_bytes; ++byte) {
            uint32_t address = box.to + row * map.box_bytes + byte;
            address ^= (address >> 7 & fold) << 4;
            const uint64_t column = static_cast<uint64_t>(box.x) * map.element + byte;
            const bool inside = box.y + row < map.rows && column < map.row_bytes;
            emulation::device.shared_begin[address] = inside ? map.data[(box.y + row) * map.pitch + column] : 0;
        }
    EmulatedBarrier& barrier = barriers_at.at(box.barrier);
    barrier.bytes -= static_cast<int>(map.box_bytes * map.box_rows);
    barrier.settle();
}

inline void wait_phase(uint32_t barrier, uint32_t parity) {
    int patience = 100000;
    while (barriers_at.at(barrier).phase == parity) {
        if (!async_boxes.empty()) {
            const AsyncBox box = async_boxes.front();
            async_boxes.pop_front();
            land(box);
        }
        if (--patience == 0) abort();
        emulation::leave(emulation::Fiber::kReady);
    }
}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

template <int kBarrier, int kThreads>
void sync_part() {
    static int arrived, generation;
    const int mine = generation;
    if (++arrived == kThreads) {
        arrived = 0;
        ++generation;
    }
    while (generation == mine) emulation::leave(emulation::Fiber::kReady);
}

struct AsyncProduct {
    float* d;
    const uint32_t* a;
    uint64_t descriptor;
    bool keep;
    int tokens;
    bool bf16;
};
// Of each thread; the last group is open.
inline std::map<unsigned, std::deque<std::vector<AsyncProduct>>> async_products;

inline std::deque<std::vector<AsyncProduct>>& my_products() {
    auto& groups = async_products[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    return groups;
}
inline double half_at(uint16_t bits, bool bf16) {
    return bf16 ? float_of_bf16(bits) : float_of_fp16(bits);
}

// B is K-major in the 128-byte swizzle; groups of 8 tokens lie the descriptor's stride apart.
inline void multiply_now(const AsyncProduct& product) {
    if (product.descriptor >> 62 != 1) abort();
    const uint32_t start = static_cast<uint32_t>(product.descriptor & 0x3fff) << 4;
    const uint32_t stride = static_cast<uint32_t>(product.descriptor >> 32 & 0x3fff) << 4;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const uint32_t* words = product.a;
    const emulation::Words* warp = emulation::exchange({{words[0], words[1], words[2], words[3]}});
    double rows[2][16];
    for (int high = 0; high < 2; ++high)
        for (int k = 0; k < 16; ++k) {
            const uint32_t word = warp[lane / 4 * 4 + k % 8 / 2].words[high + k / 8 * 2];
            rows[high][k] = half_at(static_cast<uint16_t>(word >> k % 2 * 16), product.bf16);
        }
    for (int i = 0; i < product.tokens / 2; ++i) {
        const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        double sum = product.keep ? product.d[i] : 0;
        for (int k = 0; k < 16; ++k) {
            uint32_t address = start + token / 8 * stride + token % 8 * 128 + k * 2;
            address ^= (address >> 7 & 7) << 4;
            uint16_t bits;
            memcpy(&bits, emulation::device.shared_begin + address, 2);
            sum += rows[i / 2 % 2][k] * half_at(bits, product.bf16);
        }
        product.d[i] = static_cast<float>(sum);
    }
}

inline void begin_products() {}
inline void commit_products() {
    my_products().emplace_back();
}
template <int kInFlight>
void wait_products_in_flight() {
    while (my_products().size() > kInFlight + 1) {
        const std::vector<AsyncProduct> group = my_products().front();
        my_products().pop_front();
        for (const AsyncProduct& product : group) multiply_now(product);
    }
}
template <class Values>
void hold(Values&) {}

template <Dtype kDtype, int kTokens>
struct Product {
    static void run(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t descriptor, bool keep) {
        my_products().back().push_back({d, a, descriptor, keep, kTokens, kDtype == Dtype::kBFloat16});
    }
};

}  // namespace peftkern
