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

template <class Shape>
void check(int64_t rows, int64_t columns, int64_t depth, int largest) {
    const int tokens = token_tile(rows, largest);
    if (tokens < 16 || tokens > largest || (tokens < rows && tokens != largest) || (tokens > 16 && tokens / 2 >= rows))
        fail("tile of tokens", rows, columns, depth, tokens);
    const int64_t total = steps_of(depth, Shape::kStep);
    const GemmPlan plan = plan_slices(tokens, rows, columns, Shape::kTile, total);
    if (plan.slices < 1 || plan.slices > kMostSlices || (plan.slices > 1 && plan.slice_steps < kFewestSliceSteps))
        fail("slices", rows, columns, depth, tokens);

    const int64_t token_tiles = steps_of(rows, tokens), column_tiles = steps_of(columns, Shape::kTile);
    std::vector<int> outputs(token_tiles * column_tiles * total);
    for (int slice = 0; slice < plan.slices; ++slice)
        for (int64_t block = 0; block < token_tiles * column_tiles; ++block) {
            const Tile tile = tile_of(block, slice, tokens, Shape::kTile, token_tiles, int(total), plan.slice_steps);
            if (tile.steps < 1) fail("empty slice", rows, columns, depth, tokens);
            if (tile.first_token >= rows || tile.first_column >= columns) fail("empty tile", rows, columns, depth, tokens);
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
                for (int largest : {32, 64, 256}) check<Forward>(rows, columns, depth, largest);
                for (int largest : {32, 64, 128}) check<Backward>(rows, columns, depth, largest);
            }
    // The plan's model: a matrix of few tiles is sliced, one that fills the device is not.
    const GemmPlan few = plan_slices(64, 64, 4096, 128, 32), many = plan_slices(64, 64, 14336, 128, 32);
    printf("4096 columns: %d slices of %d steps; 14336: %d\n", few.slices, few.slice_steps, many.slices);
    return failures != 0 || few.slices != 4 || many.slices != 1;
}
