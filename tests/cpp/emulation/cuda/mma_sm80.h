// mma of csrc/cuda/mma_sm80.h on the host, as the PTX manual places the operands in a warp's registers.
#pragma once

#include "cuda/nf4_maps.h"

namespace peftkern {

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
