// What the host functions ask of devices and of errors.
#include <mutex>

#include "cuda/launch.h"

namespace peftkern {
namespace {

cudaError_t read_traits(int device, DeviceTraits* traits) {
    int major = 0, minor = 0, l2 = 0;
    const struct {
        cudaDeviceAttr attribute;
        int* value;
    } wanted[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                  {cudaDevAttrComputeCapabilityMinor, &minor},
                  {cudaDevAttrMultiProcessorCount, &traits->sm_count},
                  {cudaDevAttrMaxSharedMemoryPerBlockOptin, &traits->shared_bytes},
                  {cudaDevAttrL2CacheSize, &l2},
                  {cudaDevAttrClockRate, &traits->clock_khz},
                  {cudaDevAttrMemoryClockRate, &traits->memory_clock_khz},
                  {cudaDevAttrGlobalMemoryBusWidth, &traits->bus_bits}};
    for (const auto& each : wanted) {
        const cudaError_t error = cudaDeviceGetAttribute(each.value, each.attribute, device);
        if (error != cudaSuccess) return cudaGetLastError(), error;
    }
    traits->compute_capability = 10 * major + minor;
    traits->l2_bytes = l2;
    return cudaSuccess;
}

}  // namespace
}  // namespace peftkern

extern "C" {

const char* peftkern::peftkern_cuda_error_text(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int peftkern::peftkern_cuda_traits(int device, DeviceTraits* traits) {
    static std::mutex mutex;
    static DeviceTraits known[kMostDevices];
    static bool read[kMostDevices];
    if (device < 0 || device >= kMostDevices) return cudaErrorInvalidDevice;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!read[device]) {
        const cudaError_t error = read_traits(device, &known[device]);
        if (error != cudaSuccess) return error;
        read[device] = true;
    }
    *traits = known[device];
    return cudaSuccess;
}

}  // extern "C"
