// A CUDA device on the host, for kernels' own source: the threads of a block are fibers, which run until they meet a
// barrier or an exchange within their warp. Blocks run one after another. Nothing is timed, and nothing races.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define PEFTKERN_EMULATED
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorNotSupported = 801
};
using cudaStream_t = void*;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
    int id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}

struct cudaFuncAttributes {
    int ptxVersion;
};
namespace emulation {
constexpr int kPtxVersions[] = {80, 90};  // of the code of device 0, and of device 1
inline int current_device = 0;
inline bool has_context = false;            // of this thread
inline bool last_was_programmatic = false;  // of the launches
}  // namespace emulation
inline cudaError_t cudaSetDevice(int device) {
    emulation::current_device = device;
    emulation::has_context = true;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
    attributes->ptxVersion = emulation::kPtxVersions[emulation::current_device];
    return cudaSuccess;
}

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024, kSharedBytes = 227 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN, as fp32, bf16 and fp16

struct Words {
    uint32_t words[8];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
    enum { kReady, kAtBarrier, kDone } state = kReady;
    unsigned exchanges = 0;
};

struct Device {
    std::vector<Fiber> fibers;
    std::vector<Words> slots;  // [warp][parity][lane]
    ucontext_t scheduler;
    unsigned current = 0;
    std::function<void()> body;
    std::vector<unsigned char> shared;
    unsigned char* shared_begin = nullptr;
};
inline Device device;

inline void leave(decltype(Fiber::state) state) {
    Fiber& fiber = device.fibers[device.current];
    fiber.state = state;
    swapcontext(&fiber.context, &device.scheduler);
}

}  // namespace emulation

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline void enter() {
    device.body();
    leave(Fiber::kDone);
}

inline void run_block(unsigned threads) {
    device.fibers.resize(std::max<size_t>(device.fibers.size(), threads));
    device.slots.assign(threads * 2, {});
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = device.fibers[i];
        fiber.state = Fiber::kReady;
        fiber.exchanges = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (;;) {
        unsigned done = 0, ran = 0;
        for (unsigned i = 0; i < threads; ++i) {
            if (device.fibers[i].state == Fiber::kReady) {
                device.current = i;
                threadIdx = dim3(i);
                swapcontext(&device.scheduler, &device.fibers[i].context);
                ++ran;
            }
            done += device.fibers[i].state == Fiber::kDone;
        }
        if (done == threads) return;
        if (ran) continue;
        for (unsigned i = 0; i < threads; ++i)
            if (device.fibers[i].state == Fiber::kAtBarrier) device.fibers[i].state = Fiber::kReady;
    }
}

// What all lanes of the warp give; they call it together. Two sets of slots: a lane may write its next words before
// another has read these.
inline const Words* exchange(const Words& mine) {
    const unsigned lane = device.current % kLanes, warp = device.current / kLanes;
    Words* slots = &device.slots[(warp * 2 + device.fibers[device.current].exchanges++ % 2) * kLanes];
    slots[lane] = mine;
    leave(Fiber::kReady);
    return slots;
}

}  // namespace emulation

inline void __syncthreads() {
    emulation::leave(emulation::Fiber::kAtBarrier);
}

inline void __syncwarp() {
    emulation::exchange({});
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    emulation::Words mine = {};
    memcpy(mine.words, &value, sizeof value);
    memcpy(&value, emulation::exchange(mine)[lane].words, sizeof value);
    return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % emulation::kLanes) ^ distance);
}
template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcs(const T* from) {
    return *from;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    using namespace emulation;
    if (config->dynamicSmemBytes > kSharedBytes || config->blockDim.x % kLanes) return cudaErrorInvalidValue;
    last_was_programmatic = config->numAttrs > 0;
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    device.body = [&] { kernel(arguments...); };
    for (unsigned y = 0; y < gridDim.y; ++y) {
        for (unsigned x = 0; x < gridDim.x; ++x) {
            blockIdx = dim3(x, y);
            device.shared.assign(config->dynamicSmemBytes + 256, kPoison);
            const auto begin = reinterpret_cast<uintptr_t>(device.shared.data());
            device.shared_begin = device.shared.data() + (128 - begin % 128) % 128;
            run_block(blockDim.x);
        }
    }
    return cudaSuccess;
}
