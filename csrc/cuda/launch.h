// How launchers launch: shared memory is opted in to once per kernel and device, every call is checked.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <utility>

#include "cuda/launchers.h"

namespace peftkern {

constexpr int kMostDevices = 64;
constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid's x axis, where the long axis goes

constexpr int64_t ceil_divide(int64_t n, int64_t d) {
    return (n + d - 1) / d;
}

// Lets `kernel` use `bytes` of dynamic shared memory on the current device; later calls cost one atomic load.
template <auto kernel>
cudaError_t opt_in_shared(int device, int bytes) {
    static std::atomic<uint64_t> done{0};
    if (device < 0 || device >= kMostDevices) return cudaErrorInvalidDevice;
    const uint64_t bit = uint64_t{1} << device;
    if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess)
        done.fetch_or(bit, std::memory_order_release);
    else
        cudaGetLastError();
    return error;
}

// Whether the current device runs code of `kernel` that waits for its predecessor by griddepcontrol: compiled for 9.0
// or later. On a device between the build's architectures the driver compiles older PTX, which does not wait.
template <auto kernel>
cudaError_t waits_for_predecessor(int device, bool* waits) {
    static std::atomic<int> versions[kMostDevices];  // of the PTX; 0: not asked yet
    if (device < 0 || device >= kMostDevices) return cudaErrorInvalidDevice;
    int version = versions[device].load(std::memory_order_relaxed);
    if (version == 0) {
        cudaFuncAttributes attributes;
        const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
        if (error != cudaSuccess) return cudaGetLastError(), error;
        version = attributes.ptxVersion;
        versions[device].store(version, std::memory_order_relaxed);
    }
    *waits = version >= 90;
    return cudaSuccess;
}

struct LaunchShape {
    dim3 grid, block;
    int shared_bytes;
    cudaStream_t stream;
    bool programmatic = false;  // may start before its predecessor ends, which waits_for_predecessor must allow
};

template <auto kernel, class... Arguments>
cudaError_t launch(const LaunchShape& shape, Arguments&&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = shape.stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = shape.programmatic ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
    const cudaError_t last = cudaGetLastError();
    return error != cudaSuccess ? error : last;
}

inline cudaStream_t stream_of(void* stream) {
    return static_cast<cudaStream_t>(stream);
}

}  // namespace peftkern
