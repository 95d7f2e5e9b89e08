// Instructions that CUDA C++ has no word for. tests/cpp/emulation/ has this header for the host.
#pragma once

#include <stdint.h>

namespace peftkern {

// 16 bytes that are read once: not kept in L1.
__device__ __forceinline__ void load_streaming(uint32_t (&words)[4], const void* from) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
}

// Programmatic launches, from 9.0 on: the next kernel may start, and what the one before wrote is there.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// On a boundary that TMA's and wgmma's swizzles count from.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    return shared_bytes;
}

}  // namespace peftkern
