// csrc/cuda/ptx.h on the host.
#pragma once

#include <cuda_runtime.h>

namespace peftkern {

inline void load_streaming(uint32_t (&words)[4], const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) abort();
    memcpy(words, from, sizeof words);
}
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}
inline unsigned char* dynamic_shared() {
    return emulation::device.shared_begin;
}

}  // namespace peftkern
