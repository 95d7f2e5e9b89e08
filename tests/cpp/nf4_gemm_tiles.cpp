// Tiles and slices: over all blocks of a plan, every output belongs to one tile, every step of it to one slice.
#include <cstdio>
#include <vector>

#include "cuda/nf4_gemm_maps.h"
#include "cuda/nf4_gemm_plan.h"

namespace peftkern {

int failures = 0;

void fail(const char* what, int64_t rows, int64_t columns, int64_t depth, int tokens) {
    printf("FAILED %s: %ld x %ld x %ld, %d tokens\n", what, long(rows), long(columns), long(depth), tokens);
    ++failures;
}

DeviceTraits device_of(int compute_capability, int shared_bytes) {
    DeviceTraits device{};
    device.compute_capability = compute_capability, device.shared_bytes = shared_bytes;
    return device;
}
const DeviceTraits kDevices[] = {device_of(80, 163 << 10), device_of(89, 99 << 10), device_of(90, 227 << 10)};

template <class Shape>
void check(const DeviceTraits& device, bool backward, int64_t rows, int64_t columns, int64_t depth) {
    const GemmPlan plan =
        backward ? gemm_plan(device, true, rows, depth, columns) : gemm_plan(device, false, rows, columns, depth);
    const int tokens = plan.tokens;
    const int largest = has_wgmma(device)                              ? (backward ? 128 : 256)
                        : device.compute_capability == 89 && !backward ? 32
                                                                       : 64;
    if (tokens > largest || tokens % 16 || (rows <= 16 && tokens != 16) || (rows == largest && tokens != largest))
        fail("tile of tokens", rows, columns, depth, tokens);
    const int64_t total = steps_of(depth, Shape::kStep);
    if (plan.slices < 1 || plan.slices > kMostSlices || (plan.slices > 1 && plan.slice_steps < kFewestSliceSteps))
        fail("slices", rows, columns, depth, tokens);

    const int64_t token_tiles = steps_of(rows, tokens), column_tiles = steps_of(columns, Shape::kTile);
    std::vector<int> outputs(token_tiles * column_tiles * total);
    for (int slice = 0; slice < plan.slices; ++slice)
        for (int64_t block = 0; block < token_tiles * column_tiles; ++block) {
            const Tile tile = tile_of(block, slice, tokens, Shape::kTile, token_tiles, int(total), plan.slice_steps);
            if (tile.steps < 1) fail("empty slice", rows, columns, depth, tokens);
            if (tile.first_token >= rows || tile.first_column >= columns)
                fail("empty tile", rows, columns, depth, tokens);
            const int64_t at = tile.first_token / tokens * column_tiles + tile.first_column / Shape::kTile;
            if (tile.first_token % tokens || tile.first_column % Shape::kTile)
                fail("crooked tile", rows, columns, depth, tokens);
            for (int step = 0; step < tile.steps; ++step) ++outputs[at * total + tile.step_begin + step];
        }
    for (int count : outputs)
        if (count != 1) return fail("not once", rows, columns, depth, tokens);
}

}  // namespace peftkern

int main() {
    using namespace peftkern;
    for (int64_t rows : {1, 9, 15, 16, 17, 31, 33, 64, 65, 100, 127, 129, 255, 256, 257, 300, 512, 513})
        for (int64_t columns : {8, 64, 120, 128, 136, 1000, 1024, 4096, 5120, 11008, 14336})
            for (int64_t depth : {64, 128, 192, 448, 512, 1088, 4096, 4160, 11008}) {
                for (const DeviceTraits& device : kDevices) {
                    check<Forward>(device, false, rows, columns, depth);
                    check<Backward>(device, true, rows, columns, depth);
                }
            }
    // A matrix of few tiles is sliced, one that fills the device is not.
    const GemmPlan few = gemm_plan(kDevices[2], false, 64, 4096, 4096);
    const GemmPlan many = gemm_plan(kDevices[2], false, 64, 14336, 4096);
    printf("4096 rows of weight: %d slices of %d steps; 14336: %d\n", few.slices, few.slice_steps, many.slices);
    return failures != 0 || few.slices != 4 || many.slices != 1;
}
