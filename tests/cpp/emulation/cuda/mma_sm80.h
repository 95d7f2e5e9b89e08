// csrc/cuda/mma_sm80.h on the host, as the PTX manual places operands in a warp's registers. Copies happen when they
// are waited for: what reads them earlier reads poison.
#pragma once

#include <cuda_runtime.h>

#include <deque>
#include <map>

#include "cuda/nf4_maps.h"

namespace peftkern {

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::device.shared_begin);
}

struct AsyncCopy {
    uint32_t to;
    const void* from;
    bool valid;
};
// Of each thread; the last group is open.
inline std::map<unsigned, std::deque<std::vector<AsyncCopy>>> async_copies;

inline std::deque<std::vector<AsyncCopy>>& my_copies() {
    auto& groups = async_copies[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    return groups;
}
inline void copy_async(uint32_t to, const void* from, bool valid) {
    if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) abort();
    my_copies().back().push_back({to, from, valid});
}
inline void commit_copies() {
    my_copies().emplace_back();
}
inline void wait_copies_in_flight(size_t in_flight) {
    auto& groups = my_copies();
    for (; groups.size() > in_flight + 1; groups.pop_front())
        for (const AsyncCopy& copy : groups.front()) {
            unsigned char* to = emulation::device.shared_begin + copy.to;
            if (copy.valid)
                memcpy(to, copy.from, 16);
            else
                memset(to, 0, 16);
        }
}
template <int kInFlight>
void wait_copies() {
    wait_copies_in_flight(kInFlight);
}
inline void wait_for_stage(int stages) {
    wait_copies_in_flight(static_cast<size_t>(stages) - 2);
}

// Matrix m's eight rows of 16 bytes are at the addresses of lanes 8m to 8m + 7; lane 4 g + t gets elements 2 t, 2 t + 1
// of row g, or, transposed, of column g.
inline void load_matrices_as(uint32_t (&words)[4], uint32_t address, bool transposed) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const emulation::Words* warp = emulation::exchange({{address}});
    for (int m = 0; m < 4; ++m) {
        uint16_t halves[2];
        for (int h = 0; h < 2; ++h) {
            const int across = lane % 4 * 2 + h, row = transposed ? across : lane / 4;
            const int column = transposed ? lane / 4 : across;
            memcpy(&halves[h], emulation::device.shared_begin + warp[8 * m + row].words[0] + 2 * column, 2);
        }
        words[m] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
    }
}
inline void load_matrices(uint32_t (&words)[4], uint32_t address) {
    load_matrices_as(words, address, false);
}
inline void load_matrices_transposed(uint32_t (&words)[4], uint32_t address) {
    load_matrices_as(words, address, true);
}

// d += a b, of 16 x 16 and 16 x 8. Lane 4 g + t holds of a rows g, g + 8 (registers 0, 1), columns 2 t, 2 t + 1, and
// the same 8 columns on (2, 3); of b column g, rows 2 t, 2 t + 1, and 8 on; of d rows g (0, 1), g + 8, columns 2 t, 2 t
// + 1.
template <Dtype kDtype>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const emulation::Words* warp = emulation::exchange({{a[0], a[1], a[2], a[3], b0, b1}});
    const auto half = [](uint32_t word, int k) {
        return static_cast<double>(float_of_half<kDtype>(static_cast<uint16_t>(word >> (k % 2 * 16))));
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; ++k) {
            const int quad = k % 8 / 2;
            const uint32_t left = warp[row % 8 * 4 + quad].words[row / 8 + k / 8 * 2];
            sum += half(left, k) * half(warp[column * 4 + quad].words[4 + k / 8], k);
        }
        d[i] = static_cast<float>(sum);
    }
}

}  // namespace peftkern
