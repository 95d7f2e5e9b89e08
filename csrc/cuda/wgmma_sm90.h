// The instructions of the wgmma kernels: mbarriers, TMA, wgmma with A in registers. Only where sm_90a is compiled for.
#pragma once

#include <cuda.h>

#include "cuda/mma_sm80.h"

namespace peftkern {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Barriers written by this thread become visible to TMA.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool phase_done(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}
__device__ __forceinline__ void wait_phase(uint32_t barrier, uint32_t parity) {
    while (!phase_done(barrier, parity)) {
    }
}

// A box of a row-major matrix: `x` counts elements along a row. Out of range is zeros, and counts as bytes.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int x, int y, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// __syncthreads of a part of the block.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void sync_part() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kInFlight>
__device__ __forceinline__ void wait_products_in_flight() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}
// Values that a product in flight reads or writes live, in their registers, at least until here.
template <int kCount>
__device__ __forceinline__ void hold(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
__device__ __forceinline__ void hold(uint32_t (&values)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// d[T/2] (+)= A (64 x 16, registers) B (16 x T tokens, shared memory): `keep` false starts a new sum.
template <Dtype kDtype, int kTokens>
struct Product;

#define PEFTKERN_8(d, i)                                                                                        \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define PEFTKERN_16(d, i) PEFTKERN_8(d, i), PEFTKERN_8(d, i + 8)
#define PEFTKERN_32(d, i) PEFTKERN_16(d, i), PEFTKERN_16(d, i + 16)
#define PEFTKERN_64(d, i) PEFTKERN_32(d, i), PEFTKERN_32(d, i + 32)
#define PEFTKERN_128(d, i) PEFTKERN_64(d, i), PEFTKERN_64(d, i + 64)

#define PEFTKERN_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PEFTKERN_NAMES_16 PEFTKERN_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PEFTKERN_NAMES_32                                          \
    PEFTKERN_NAMES_16                                              \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27" \
    ", %28, %29, %30, %31"
#define PEFTKERN_NAMES_64                                                                     \
    PEFTKERN_NAMES_32                                                                         \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
    "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PEFTKERN_NAMES_128                                                                                            \
    PEFTKERN_NAMES_64                                                                                                 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "     \
    "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, " \
    "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "    \
    "%124, %125, %126, %127"

#define PEFTKERN_PRODUCT_OF(dtype, type, tokens, count, a0, a1, a2, a3, where, when)                               \
    template <>                                                                                                    \
    struct Product<dtype, tokens> {                                                                                \
        static __device__ __forceinline__ void run(float (&d)[count], const uint32_t (&a)[4], uint64_t descriptor, \
                                                   bool keep) {                                                    \
            asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #when                                              \
                         ", 0;\n wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type               \
                         " {" PEFTKERN_NAMES_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #where       \
                                                     ", p, 1, 1, 0;\n}"                                            \
                         : PEFTKERN_##count(d, 0)                                                                  \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(int(keep)));           \
        }                                                                                                          \
    };
#define PEFTKERN_PRODUCT(...)                                  \
    PEFTKERN_PRODUCT_OF(Dtype::kBFloat16, "bf16", __VA_ARGS__) \
    PEFTKERN_PRODUCT_OF(Dtype::kFloat16, "f16", __VA_ARGS__)

PEFTKERN_PRODUCT(16, 8, 8, 9, 10, 11, 12, 13)
PEFTKERN_PRODUCT(32, 16, 16, 17, 18, 19, 20, 21)
PEFTKERN_PRODUCT(64, 32, 32, 33, 34, 35, 36, 37)
PEFTKERN_PRODUCT(128, 64, 64, 65, 66, 67, 68, 69)
PEFTKERN_PRODUCT(256, 128, 128, 129, 130, 131, 132, 133)

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace peftkern
