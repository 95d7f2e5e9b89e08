// Which kernels run nf4_linear: a pure function of shape, dtype and the device's constants, so that the same call gives
// the same bits whatever else runs. There are no names of GPUs in it, and no measured thresholds: it compares times
// that follow from bytes and operations, and takes the least; ties go to the fused kernel.
//
//     decode, GEMM: codes and scales once from memory, or the multiplications at a share of the peak, or the look-ups
//     of
//                   the codes, which every tile of tokens repeats: whichever takes longest
//     dense:        the weight is written and read once more, and then a 16-bit product at the library's rate
//
// With B the bandwidth and P the peak, the GEMM wins over dense up to about 1.26 P/B * share / (1 - share) rows.
#pragma once

#include <stdint.h>

#include "cuda/launchers.h"
#include "cuda/nf4_decode_maps.h"
#include "cuda/nf4_gemm_plan.h"

namespace peftkern {

enum class LinearKernel { kDecode, kGemm, kDense };

struct LinearCall {
    int64_t rows, out_features, in_features;
    Dtype dtype;
    int64_t block_size;
    bool nested;
    bool backward;  // dX = dY W, which contracts over out_features
    bool has_gemm;  // the build has GEMM kernels for this device
};

// Shares of peak that kernels reach, from their instruction counts; no GPU has confirmed them yet.
constexpr double kCopyShare = 0.90;       // of the bandwidth that clocks and bus width promise
constexpr double kPeakShare = 0.75;       // of the peak, in a large product of the library
constexpr double kFusedReadShare = 0.80;  // of kCopyShare, in decode and GEMM
constexpr double kDequantizeShare = 0.85;
// FLOP per byte where a clock is not told: between today's data-centre GPUs.
constexpr double kDefaultIntensity = 184.0;

// Dense 16-bit FLOP per SM and clock.
inline double tensor_rate(int compute_capability) {
    if (compute_capability >= 100 && compute_capability < 120) return 8192;
    if (compute_capability >= 90 && compute_capability < 100) return 4096;
    return compute_capability == 80 ? 2048 : 1024;
}

// Of the peak: wgmma overlaps with look-ups, mma.sync shares its issue slots with them, and from 9.0 on reaches only a
// part of the peak.
inline double gemm_share(int compute_capability) {
    if (compute_capability == 90) return 0.75;
    return compute_capability > 90 ? 0.5 : 0.65;
}

struct DeviceRates {
    double bytes, flops, sm_clocks;  // a second
};

inline DeviceRates rates_of(const DeviceTraits& device) {
    const double per_clock = tensor_rate(device.compute_capability);
    const double sm_clocks = static_cast<double>(device.sm_count) * device.clock_khz * 1e3;
    const double bytes = 2.0 * device.memory_clock_khz * 1e3 * device.bus_bits / 8 * kCopyShare;
    if (sm_clocks > 0 && bytes > 0) return {bytes, sm_clocks * per_clock * kPeakShare, sm_clocks};
    return {1.0, kDefaultIntensity, kDefaultIntensity / (per_clock * kPeakShare)};
}

// What the fused kernels take: 16-bit x, whole blocks in a row, rows of codes in whole 32 bytes, offsets within a tile
// in 32 bits.
inline bool fused_takes(const LinearCall& call) {
    constexpr int64_t kMostFeatures = int64_t{1} << 26;
    return call.dtype != Dtype::kFloat32 && call.block_size >= 64 && call.in_features % 64 == 0 &&
           call.in_features % call.block_size == 0 && call.in_features > 0 && call.in_features <= kMostFeatures &&
           (!call.backward || (call.out_features % 8 == 0 && call.out_features > 0));
}

inline LinearKernel choose_kernel(const LinearCall& call, const DeviceTraits& device) {
    if (!fused_takes(call)) return LinearKernel::kDense;
    // Up to 8 rows the codes' bytes are all there is to it.
    if (!call.backward && call.rows <= kDecodeRows) return LinearKernel::kDecode;
    if (!call.has_gemm) return LinearKernel::kDense;
    const DeviceRates rates = rates_of(device);
    const double weights = static_cast<double>(call.out_features) * static_cast<double>(call.in_features);
    const double code_bytes = weights * (0.5 + (call.nested ? 1.0 : 4.0) / static_cast<double>(call.block_size));
    const double flops = 2.0 * weights * static_cast<double>(call.rows);
    const auto larger = [](double a, double b) { return a > b ? a : b; };

    // Every tile of tokens looks all codes up again.
    const TokenTile tile = token_tile(device, call.backward, call.rows);
    const double clocks = static_cast<double>(steps_of(call.rows, tile.tokens) * tile.clocks);
    const double look_up = weights * clocks / 1024 / rates.sm_clocks;
    const double read = code_bytes / (kFusedReadShare * rates.bytes);
    const double multiply = flops / (gemm_share(device.compute_capability) * rates.flops);
    const double fused = larger(read, larger(multiply, look_up));

    const double dequantize = (code_bytes + 2 * weights) / (kDequantizeShare * rates.bytes);
    const bool stays_in_cache = 2 * weights <= static_cast<double>(device.l2_bytes) / 2;
    const double product = larger(flops / rates.flops, stays_in_cache ? 0.0 : 2 * weights / rates.bytes);
    return fused <= dequantize + product ? LinearKernel::kGemm : LinearKernel::kDense;
}

}  // namespace peftkern
