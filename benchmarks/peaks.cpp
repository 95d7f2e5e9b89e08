// What the machine can do at most: each function works for about `seconds` and returns units per second of one thread.
#include <immintrin.h>
#include <stdint.h>

#include <chrono>

namespace {
double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace

// Bytes read per second, from a buffer larger than the caches.
extern "C" double read_bandwidth(const uint8_t* buffer, int64_t bytes, double seconds) {
    const double begin = now();
    int64_t passes = 0;
    do {
        uint64_t sum[4] = {};
        for (int64_t i = 0; i < bytes; i += 32)
            for (int j = 0; j < 4; ++j) sum[j] += *reinterpret_cast<const uint64_t*>(buffer + i + 8 * j);
        volatile uint64_t sink = sum[0] + sum[1] + sum[2] + sum[3];
        (void)sink;
        ++passes;
    } while (now() - begin < seconds);
    return static_cast<double>(passes) * static_cast<double>(bytes) / (now() - begin);
}

// 16 independent accumulators, more than latency x ports.
#define REPEAT16(M) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)
#define PEAK(name, instruction, operations)                                                                   \
    extern "C" double name(double seconds) {                                                                  \
        const double begin = now();                                                                           \
        int64_t rounds = 0;                                                                                   \
        do {                                                                                                  \
            for (int i = 0; i < 10000; ++i)                                                                   \
                __asm__ volatile(REPEAT16(instruction)::                                                      \
                                     : "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"); \
            ++rounds;                                                                                         \
        } while (now() - begin < seconds);                                                                    \
        return static_cast<double>(rounds) * 10000 * 16 * operations / (now() - begin);                       \
    }

#ifdef __FMA__
#define FMA256(i) "vfmadd231ps %%ymm0, %%ymm1, %%ymm" #i "\n"
PEAK(fp32_flops_avx2, FMA256, 16)
#endif
#ifdef __AVX512F__
#define FMA512(i) "vfmadd231ps %%zmm0, %%zmm1, %%zmm" #i "\n"
PEAK(fp32_flops_avx512, FMA512, 32)
#endif
#ifdef __AVX512BF16__
#define DOT512(i) "vdpbf16ps %%zmm0, %%zmm1, %%zmm" #i "\n"
PEAK(bf16_flops_avx512bf16, DOT512, 64)
#endif
