// A CUDA device that does nothing, for a torch without CUDA: with it, fake tensors on "cuda" can be copied, indexed and
// differentiated, so that what an op does on a GPU can be read off op by op. torch looks its hooks up once, by the name
// CUDAHooks, so this is loaded before torch is imported; see benchmarks/fake_cuda.py.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::EventFlag;
using c10::Stream;

const Device kDevice(DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
    Device exchangeDevice(Device) const override { return kDevice; }
    Device getDevice() const override { return kDevice; }
    Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kDevice); }
    Stream exchangeStream(Stream) const noexcept override { return getStream(kDevice); }
    // Autograd asks for events that it can give back.
    void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override {
        *event = const_cast<Guard*>(this);
    }
    void block(void*, const Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
};

struct CUDAHooks final : at::CUDAHooksInterface {
    CUDAHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
