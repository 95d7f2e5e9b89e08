// Which lane holds what in nf4_linear_decode.cu, and how its work is cut: on the device and, for tests, on the host.
//
// mma.m16n8k16 takes rows of the weight as its rows and rows of x as its columns. The order of a contraction is free as
// long as both sides have the same, so that a lane decodes neighbours: 16 bytes of a row, a quarter of a group of 128.
// Two lanes of a quad decode the group's first 64 elements, two the second, which may have another scale. To keep them
// apart, columns 0 to 3 are four rows of x with zeros beside the second half, columns 4 to 7 the same rows with zeros
// beside the first: a lane's sums then belong to the half that it decoded, and one factor a lane scales them.
#pragma once

#include "cuda/launchers.h"

namespace peftkern {

constexpr int kDecodeRows = 8;      // of x, at most
constexpr int kDecodeMaskRows = 4;  // of x in one mma
constexpr int kDecodeGroup = 128;
constexpr int kDecodeHalf = 64;
constexpr int kDecodeTile = 16;     // rows of the weight in one mma; a lane decodes two, 8 apart
constexpr int kDecodeProducts = 8;  // mma of a group
constexpr int kDecodeMostWarps = 16;

PEFTKERN_BOTH int decode_weight_row(int lane) {
    return lane >> 2;
}
PEFTKERN_BOTH int decode_half(int lane) {
    return (lane & 3) >> 1;
}
// The first element of the lane's 32 in the group; product j takes elements 4 j to 4 j + 3 of them: the first two in
// slots 2 t, 2 t + 1 of its contraction, the others in 2 t + 8, 2 t + 9 (t: the lane in its quad).
PEFTKERN_BOTH int decode_first_element(int lane) {
    return 32 * (lane & 3);
}
// As its lane for the columns of an mma: the row of x that it supplies, and whether it does or supplies zeros.
PEFTKERN_BOTH int decode_supplied_row(int lane) {
    return lane >> 2 & 3;
}
PEFTKERN_BOTH bool decode_supplies(int lane) {
    return lane >> 4 == decode_half(lane);
}
// The row of x that the lane's sums c (0, 1) belong to, once those of lane ^ 2 are added.
PEFTKERN_BOTH int decode_summed_row(int lane, int c) {
    return (2 * lane + c) & 3;
}

struct DecodePlan {
    int row_tiles;  // of 16 weight rows, for each CTA
    int warps;      // share a CTA's groups
    int splits;     // of the groups, over CTAs
    int split_groups;
    int ctas;  // of each split; they go round the tiles
};

// Bytes in flight hide the memory's latency, so an SM should have 16 warps with work: CTAs of 16 warps where the rows
// are few or the memory for the look-up table suffices for one CTA only, else of 8. Where even single tiles are too few
// for the SMs, the contraction is split. A function of shape and device, so that a call always gives the same bits.
inline DecodePlan decode_plan(int64_t rows, int64_t out_features, int64_t in_features, const DeviceTraits& device) {
    const auto tiles_of = [&](int row_tiles) {
        return (out_features + row_tiles * kDecodeTile - 1) / (row_tiles * kDecodeTile);
    };
    const int64_t sms = device.sm_count > 0 ? device.sm_count : 1;
    const int64_t groups = (in_features + kDecodeGroup - 1) / kDecodeGroup;
    DecodePlan plan;
    const bool one_cta = device.shared_bytes < 2 * kPairTableBytes;
    // Two tiles share the loads of x, but with eight rows of x they need more registers than 16 warps have.
    plan.row_tiles = rows <= kDecodeMaskRows && tiles_of(2) >= 2 * sms ? 2 : 1;
    const int64_t tiles = tiles_of(plan.row_tiles);
    plan.warps = one_cta || (plan.row_tiles == 1 && tiles <= 2 * sms) ? 16 : 8;
    int64_t splits = 1;
    while (2 * splits * tiles <= 2 * sms && splits < 8 && groups >= 2 * splits * 2 * plan.warps) splits *= 2;
    const int64_t split_groups = (groups + splits - 1) / splits;
    plan.split_groups = static_cast<int>(split_groups);
    plan.splits = static_cast<int>(groups > 0 ? (groups + split_groups - 1) / split_groups : 1);
    const int64_t resident = sms * (one_cta || plan.warps == 16 ? 1 : 2);
    const int64_t most = resident > plan.splits ? resident / plan.splits : 1;
    plan.ctas = static_cast<int>(tiles < most || tiles <= 2 * sms ? tiles : most);
    return plan;
}

}  // namespace peftkern
