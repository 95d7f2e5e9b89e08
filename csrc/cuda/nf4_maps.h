// Where NF4 elements lie, what their scales are and how kernels look codes up: on the device and, for tests, on the
// host.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/nf4_codebook.h"
#include "common/nf4_format.h"
#include "common/nf4_nearest.h"
#include "cuda/element.h"

namespace peftkern {

// A weight in device memory. absmax is fp32, or bytes where nested_absmax is not null; offset is one fp32 value, which
// the host must not read.
struct Nf4View {
    const uint8_t* codes;
    const void* absmax;
    const float* nested_absmax;
    const float* nested_quant_map;
    const float* offset;
    int block_shift;
};

constexpr int kNestedBlockShift = 8;
static_assert(kNestedBlockSize == 1 << kNestedBlockShift, "");
constexpr int kNearestCells = 32;

// The tables of common/, as device code can index them.
struct Nf4Tables {
    float fp32[16];
    float cell_midpoint[kNearestCells];
    uint32_t cell_code[kNearestCells];
    uint16_t bf16[16], fp16[16];

    constexpr Nf4Tables() : fp32(), cell_midpoint(), cell_code(), bf16(), fp16() {
        for (int i = 0; i < 16; ++i) {
            fp32[i] = kNf4Codebook[i];
            bf16[i] = kNf4Bf16Codebook[i];
            fp16[i] = kNf4Fp16Codebook[i];
        }
        for (int i = 0; i < kNearestCells; ++i) {
            cell_midpoint[i] = kNf4Cells.midpoint[i];
            cell_code[i] = static_cast<uint32_t>(kNf4Cells.first_code[i]);
        }
    }
};
#ifdef __CUDACC__
static __constant__ Nf4Tables kDeviceTables;
#endif
static constexpr Nf4Tables kHostTables;

PEFTKERN_BOTH const Nf4Tables& nf4_tables() {
#ifdef __CUDA_ARCH__
    return kDeviceTables;
#else
    return kHostTables;
#endif
}

// Element e of the row-major weight: the first of a byte is its high nibble.
PEFTKERN_BOTH int64_t byte_of(int64_t e) {
    return e >> 1;
}
PEFTKERN_BOTH int code_in(uint8_t byte, int64_t e) {
    return e & 1 ? byte & 15 : byte >> 4;
}
// Bit offset of the code of element e of the 8 in a little-endian word.
PEFTKERN_BOTH constexpr int shift_in_word(int e) {
    return 8 * (e >> 1) + (e & 1 ? 0 : 4);
}

// The address of that code's value in a table of [16 codes][32 lanes] fp32 values, where lanes never conflict, for the
// lane of lane_offset = 4 * lane: two instructions, if the compiler is kept from making three of the last.
PEFTKERN_BOTH uint32_t lane_table_address(uint32_t word, int e, uint32_t lane_offset) {
    const int shift = shift_in_word(e) - 7;
    const uint32_t shifted = shift < 0 ? word << -shift : word >> shift;
#ifdef __CUDA_ARCH__
    uint32_t address;
    asm("lop3.b32 %0, %1, 0x780, %2, 0xea;" : "=r"(address) : "r"(shifted), "r"(lane_offset));
    return address;
#else
    return (shifted & 0x780) | lane_offset;
#endif
}

PEFTKERN_BOTH int64_t block_of(int64_t e, int block_shift) {
    return e >> block_shift;
}

// Product and sum are rounded one by one, as bitsandbytes and torch do; a contraction would change the last bit.
PEFTKERN_BOTH float nested_scale(float map_value, float nested_absmax, float offset) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(__fmul_rn(map_value, nested_absmax), offset);
#else
    const float product = map_value * nested_absmax;
    return product + offset;
#endif
}

// `map` is view.nested_quant_map or a copy of it nearer by, `offset` the value at view.offset.
template <bool kNested>
PEFTKERN_BOTH float block_scale(const Nf4View& view, int64_t block, const float* map, float offset) {
    if (!kNested) return static_cast<const float*>(view.absmax)[block];
    const uint8_t byte = static_cast<const uint8_t*>(view.absmax)[block];
    return nested_scale(map[byte], view.nested_absmax[block >> kNestedBlockShift], offset);
}

// The nearest code is its cell's first one, plus one above the cell's midpoint: ties go to the lower code. NaN, which
// converts to 0, and everything else stays within the cells.
PEFTKERN_BOTH int nearest_cell(float value) {
#ifdef __CUDA_ARCH__
    const int cell = __float2int_rz(value * Nf4Cells::kScale + Nf4Cells::kShift);
#else
    const int cell = value == value ? static_cast<int>(value * Nf4Cells::kScale + Nf4Cells::kShift) : 0;
#endif
    return cell & (kNearestCells - 1);
}
PEFTKERN_BOTH uint32_t code_in_cell(float value, float midpoint, uint32_t first_code) {
    return first_code + (value > midpoint);
}

// Where the nested quantiser's grid has absmax - offset, scaled to [-1, 1]; every step is rounded by itself.
PEFTKERN_BOTH int grid_position(float scaled) {
#ifdef __CUDA_ARCH__
    const float half = __fmul_rn(__fadd_rn(scaled, 1.0f), 0.5f);
    return __float2int_rz(__fadd_rn(__fmul_rn(half, kGridSize - 1), 0.5f));
#else
    const float half = (scaled + 1.0f) * 0.5f, place = half * (kGridSize - 1);
    return static_cast<int>(place + 0.5f);
#endif
}
PEFTKERN_BOTH float grid_value(int position) {
    return -1.0f + static_cast<float>(2 * position) / static_cast<float>(kGridSize - 1);
}
// The index of the nearest of an ascending map of 256 values, ties to the lower one.
PEFTKERN_BOTH int nearest_of_map(const float* map, float value) {
    int low = 0;
    for (int width = static_cast<int>(kNestedMapSize) / 2; width > 0; width /= 2) {
        const float midpoint = 0.5f * (map[low + width - 1] + map[low + width]);
        if (value > midpoint) low += width;
    }
    return low;
}

// prmt: byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes a, b.
PEFTKERN_BOTH uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
    return __byte_perm(a, b, selector);
#else
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
#endif
}

// The pair table turns a byte of codes into its two values. It has a row of 256 bytes for every byte, with an entry for
// each of the 32 lanes: a lane reads its own banks, so look-ups never conflict, and the address is one prmt. Entries:
// 4 bytes, two values of the scaled 16-bit codebook (half of a row stays free), or 8 bytes, two of the fp32 codebook.
constexpr int kPairRows = 256;
constexpr int kPairRowBytes = 256;
constexpr int kPairTableBytes = kPairRows * kPairRowBytes;

template <int kEntryBytes>
PEFTKERN_BOTH uint32_t pair_lane_offset(int lane) {
    static_assert(kEntryBytes == 4 || kEntryBytes == 8, "32 entries fit a row");
    return static_cast<uint32_t>(lane * kEntryBytes);
}

// The address in the table of byte i of a word: {lane_offset, byte i, 0, 0}.
PEFTKERN_BOTH uint32_t pair_address(uint32_t word, int i, uint32_t lane_offset) {
    return byte_permute(word, lane_offset, 0x5504u | static_cast<uint32_t>(i) << 4);
}

// The first element in the low half, as the fragments of mma want it.
template <Dtype kDtype>
PEFTKERN_BOTH uint32_t pair16(int byte) {
    static_assert(kDtype != Dtype::kFloat32, "16-bit types only");
    const uint16_t* values = kDtype == Dtype::kBFloat16 ? nf4_tables().bf16 : nf4_tables().fp16;
    return values[byte >> 4] | static_cast<uint32_t>(values[byte & 15]) << 16;
}

// A scale times this goes with the 16-bit codebook.
template <Dtype kDtype>
PEFTKERN_BOTH constexpr float pair16_unscale() {
    return kDtype == Dtype::kBFloat16 ? 1.0f / kNf4Bf16Scale : 1.0f / kNf4Fp16Scale;
}

// The table is filled by 16-byte stores, `store` in [0, kPair16Stores) or [0, kPair32Stores).
constexpr int kPair16Stores = kPairRows * 32 * 4 / 16;
constexpr int kPair32Stores = kPairRows * 32 * 8 / 16;
PEFTKERN_BOTH int pair16_store_byte(int store) {
    return store >> 3;
}
PEFTKERN_BOTH int pair16_store_address(int store) {
    return (store >> 3) * kPairRowBytes + (store & 7) * 16;
}
PEFTKERN_BOTH int pair32_store_byte(int store) {
    return store >> 4;
}
PEFTKERN_BOTH int pair32_store_address(int store) {
    return (store >> 4) * kPairRowBytes + (store & 15) * 16;
}

#if defined(__CUDACC__) || defined(PEFTKERN_EMULATED)
// Fills a table of kPairTableBytes in shared memory; the caller synchronises.
template <Dtype kDtype>
__device__ __forceinline__ void fill_pair16(unsigned char* table, int thread, int threads) {
    for (int store = thread; store < kPair16Stores; store += threads) {
        const uint32_t pair = pair16<kDtype>(pair16_store_byte(store));
        *reinterpret_cast<uint4*>(table + pair16_store_address(store)) = make_uint4(pair, pair, pair, pair);
    }
}

__device__ __forceinline__ void fill_pair32(unsigned char* table, int thread, int threads) {
    for (int store = thread; store < kPair32Stores; store += threads) {
        const int byte = pair32_store_byte(store);
        const float first = nf4_tables().fp32[byte >> 4], second = nf4_tables().fp32[byte & 15];
        *reinterpret_cast<float4*>(table + pair32_store_address(store)) = make_float4(first, second, first, second);
    }
}
#endif

}  // namespace peftkern
