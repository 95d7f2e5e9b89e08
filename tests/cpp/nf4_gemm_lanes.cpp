// The four GEMM kernels, lane by lane: their loaders, addresses, decoders and maps, on the instructions of
// tensor_core.h.
#include "nf4_gemm_replay.h"

namespace peftkern {

constexpr unsigned char kPoison = 0xff;  // a NaN in every type, and no code that a test expects

template <class T>
T read_at(const unsigned char* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

template <class Loader, class Shape, int kTokens, class ProblemType>
void fill_by_copies(unsigned char* stage, std::vector<Loader>& loaders, const ProblemType& problem, int step) {
    memset(stage, kPoison, Shape::template kBytes<kTokens>);
    for (int thread = 0; thread < kThreadsSm80; ++thread) {
        loaders[thread].next([&](int to, const void* from, bool valid) {
            if (valid)
                memcpy(stage + to, from, 16);
            else
                memset(stage + to, 0, 16);
        });
        const float scale = problem.scale(loaders[thread].scale(step));
        memcpy(stage + Shape::template kScalesAt<kTokens> + thread * 4, &scale, 4);
    }
}

template <class Boxes, class Shape, int kTokens, class ProblemType>
void fill_by_boxes(unsigned char* shared, int stage, const Tile& tile, const ProblemType& problem, int step) {
    const CudaLinear& linear = problem.linear;
    const GlobalMatrix tokens{linear.x, linear.rows, problem.depth() * 2, linear.x_stride * 2};
    const GlobalMatrix codes{linear.weight.codes, linear.out_features, linear.in_features / 2, linear.in_features / 2};
    const int width = problem.backward ? 128 : 64, code_rows = problem.backward ? Shape::kStep : Shape::kTile;
    memset(shared + stage, kPoison, Shape::template kBytes<kTokens>);
    for (int thread = 0; thread < 128; ++thread) {
        const Boxes boxes(linear, tile, thread);
        int bytes = 0;
        if (thread == 0) {
            boxes.copy(step, [&](Operand operand, int to, int column, int row) {
                const bool x = operand == Operand::kTokens;
                load_box(shared, stage + to, x ? tokens : codes, int64_t{column} * (x ? 2 : 1), row,
                         x ? kTokens : code_rows, x ? 128 : width);
                bytes += x ? kTokens * 128 : code_rows * width;
            });
            if (bytes != Boxes::kCopyBytes) abort();
        }
        for (int i = 0; i < 2; ++i) {
            const float scale = problem.scale(boxes.scale(step, i));
            memcpy(shared + stage + Shape::template kScalesAt<kTokens> + boxes.place(i) * 4, &scale, 4);
        }
    }
}

template <int kTokens, class ProblemType>
void forward_sm80(ProblemType& problem, const GemmPlan& plan) {
    const auto table = pair_table(problem.dtype, false);
    std::vector<unsigned char> stage_bytes(Forward::kBytes<kTokens>);
    unsigned char* stage = stage_bytes.data();
    for_tiles<Forward>(problem, plan, [&](const Tile& tile) {
        std::vector<ForwardLoader<kTokens>> loaders;
        for (int thread = 0; thread < kThreadsSm80; ++thread) loaders.emplace_back(problem.linear, tile, thread);
        std::vector<double> result(2 * kTokens * kRowPitch);
        for (int step = 0; step < tile.steps; ++step) {
            fill_by_copies<ForwardLoader<kTokens>, Forward, kTokens>(stage, loaders, problem, tile.step_begin + step);
            const unsigned char* codes = stage + Forward::kCodesAt<kTokens>;
            for (int warp = 0; warp < 8; ++warp) {
                const int half = warp >> 2, first_row = (warp & 3) * 32;
                for (int row_tile = 0; row_tile < 2; ++row_tile) {
                    Fragments fragments[4];
                    for (int lane = 0; lane < 32; ++lane) {
                        uint32_t words[2][2], lane_fragments[4][4];
                        const int row = first_row + row_tile * 16 + (lane >> 2);
                        memcpy(words[0], codes + sm80_code_address(row, half, lane), 8);
                        memcpy(words[1], codes + sm80_code_address(row + 8, half, lane), 8);
                        decode_permuted(lane_fragments, words[0], words[1], table.data(), pair_lane_offset<4>(lane));
                        for (int j = 0; j < 4; ++j) memcpy(fragments[j][lane], lane_fragments[j], 16);
                    }
                    for (int column = 0; column < kTokens / 8; ++column) {
                        double block[32][4] = {};
                        for (int j = 0; j < 4; ++j) {
                            uint32_t b[32][2];
                            for (int lane = 0; lane < 32; ++lane)
                                memcpy(b[lane],
                                       stage + sm80_x_address(kTokens, half, column, lane, j >> 1) + (j & 1) * 8, 8);
                            mma(block, fragments[j], b, problem.dtype);
                        }
                        for (int lane = 0; lane < 32; ++lane)
                            for (int i = 0; i < 4; ++i) {
                                const int row = first_row + row_tile * 16 + accumulator_row(lane, i);
                                const float scale =
                                    read_at<float>(stage + Forward::kScalesAt<kTokens> + (half * 128 + row) * 4);
                                const int token = column * 8 + accumulator_token(lane, i);
                                result[half * kTokens * kRowPitch + tile_index(token, row)] += scale * block[lane][i];
                            }
                    }
                }
            }
        }
        for (int token = 0; token < kTokens; ++token)
            for (int out = 0; out < Forward::kTile; ++out)
                problem.add(tile.first_token + token, tile.first_column + out,
                            result[tile_index(token, out)] + result[kTokens * kRowPitch + tile_index(token, out)]);
    });
}

template <int kTokens, class ProblemType>
void forward_sm90(ProblemType& problem, const GemmPlan& plan) {
    const auto table = pair_table(problem.dtype, problem.exact);
    constexpr int kStage = kStagesOffsetSm90;
    std::vector<unsigned char> shared(kStage + Forward::kBytes<kTokens>, kPoison);
    const unsigned char* stage = shared.data() + kStage;
    for_tiles<Forward>(problem, plan, [&](const Tile& tile) {
        std::vector<double> result(kTokens * kRowPitch);
        for (int step = 0; step < tile.steps; ++step) {
            fill_by_boxes<ForwardBoxes<kTokens>, Forward, kTokens>(shared.data(), kStage, tile, problem, step);
            for (int warp = 0; warp < 8; ++warp)
                for (int half = 0; half < 2; ++half) {
                    Fragments fragments[4];
                    float scales[32][2];
                    for (int lane = 0; lane < 32; ++lane) {
                        uint32_t words[2][8], decoded[4][4];
                        for (int i = 0; i < 4; ++i)
                            memcpy(&words[i >> 1][(i & 1) * 4],
                                   stage + Forward::kCodesAt<kTokens> +
                                       sm90_code_address(sm90_row(warp, lane) + (i >> 1) * 8, half, i & 1),
                                   16);
                        for (int high = 0; high < 2; ++high)
                            scales[lane][high] = read_at<float>(stage + Forward::kScalesAt<kTokens> +
                                                                (half * 128 + sm90_row(warp, lane) + high * 8) * 4);
                        if (problem.exact)
                            decode_natural_exact<ProblemType::dtype>(decoded, words[0], words[1], scales[lane][0],
                                                                     scales[lane][1], table.data(),
                                                                     pair_lane_offset<8>(lane), lane & 3);
                        else
                            decode_natural(decoded, words[0], words[1], table.data(), pair_lane_offset<4>(lane),
                                           lane & 3);
                        for (int k16 = 0; k16 < 4; ++k16) memcpy(fragments[k16][lane], decoded[k16], 16);
                    }
                    std::vector<double> block[32];
                    for (auto& lane : block) lane.assign(kTokens / 2, 0.0);
                    for (int k16 = 0; k16 < 4; ++k16)
                        wgmma(block, fragments[k16], shared.data(),
                              token_descriptor(kStage + half * kTokens * 128 + token_step_offset(k16)), kTokens,
                              problem.dtype);
                    for (int lane = 0; lane < 32; ++lane)
                        for (int i = 0; i < kTokens / 2; ++i) {
                            const int token = (i >> 2) * 8 + accumulator_token(lane, i & 3);
                            const double scale = problem.exact ? 1 : scales[lane][i >> 1 & 1];
                            result[tile_index(token, warp * 16 + accumulator_row(lane, i & 3))] +=
                                scale * block[lane][i];
                        }
                }
        }
        for (int token = 0; token < kTokens; ++token)
            for (int out = 0; out < Forward::kTile; ++out)
                problem.add(tile.first_token + token, tile.first_column + out, result[tile_index(token, out)]);
    });
}

// Both dX kernels: they differ in how a stage is filled and in where the tokens are read.
template <int kTokens, bool kSm90, class ProblemType>
void backward(ProblemType& problem, const GemmPlan& plan) {
    const auto table = pair_table(problem.dtype, true);
    constexpr int kStage = kStagesOffsetSm90;
    std::vector<unsigned char> shared(kStage + Backward::kBytes<kTokens>, kPoison);
    unsigned char* stage = shared.data() + kStage;
    for_tiles<Backward>(problem, plan, [&](const Tile& tile) {
        std::vector<BackwardLoader<kTokens>> loaders;
        for (int thread = 0; thread < kThreadsSm80; ++thread) loaders.emplace_back(problem.linear, tile, thread);
        std::vector<double> sums[8][2][32];
        for (auto& warp : sums)
            for (auto& row_tile : warp)
                for (auto& lane : row_tile) lane.assign(kTokens / 2, 0.0);
        for (int step = 0; step < tile.steps; ++step) {
            if (kSm90)
                fill_by_boxes<BackwardBoxes<kTokens>, Backward, kTokens>(shared.data(), kStage, tile, problem, step);
            else
                fill_by_copies<BackwardLoader<kTokens>, Backward, kTokens>(stage, loaders, problem,
                                                                           tile.step_begin + step);
            for (int warp = 0; warp < 8; ++warp)
                for (int half = 0; half < 2; ++half) {
                    int addresses[32];
                    for (int lane = 0; lane < 32; ++lane)
                        addresses[lane] = Backward::kCodesAt<kTokens> + backward_code_address(half, warp, lane);
                    Fragments words, fragments[2][2];
                    load_matrices(words, stage, addresses, true);
                    for (int lane = 0; lane < 32; ++lane) {
                        Pair scales[4];
                        for (int m = 0; m < 4; ++m)
                            scales[m] = read_at<Pair>(stage + Backward::kScalesAt<kTokens> +
                                                      backward_scale_index(half, warp, m, lane) * 4);
                        uint32_t decoded[2][2][4];
                        decode_transposed<ProblemType::dtype>(decoded, words[lane], scales, table.data(),
                                                              pair_lane_offset<8>(lane));
                        for (int i = 0; i < 4; ++i) memcpy(fragments[i >> 1][i & 1][lane], decoded[i >> 1][i & 1], 16);
                    }
                    for (int k16 = 0; k16 < 2; ++k16)
                        for (int row_tile = 0; row_tile < 2; ++row_tile) {
                            if (kSm90) {
                                wgmma(sums[warp][row_tile], fragments[k16][row_tile], shared.data(),
                                      token_descriptor(kStage + token_step_offset(half * 2 + k16)), kTokens,
                                      problem.dtype);
                                continue;
                            }
                            for (int column = 0; column < kTokens / 8; ++column) {
                                for (int lane = 0; lane < 32; ++lane)
                                    addresses[lane] = backward_x_address(half, column, lane);
                                Fragments tokens;
                                load_matrices(tokens, stage, addresses, false);
                                uint32_t b[32][2];
                                double d[32][4] = {};
                                for (int lane = 0; lane < 32; ++lane) memcpy(b[lane], &tokens[lane][2 * k16], 8);
                                mma(d, fragments[k16][row_tile], b, problem.dtype);
                                for (int lane = 0; lane < 32; ++lane)
                                    for (int i = 0; i < 4; ++i)
                                        sums[warp][row_tile][lane][column * 4 + i] += d[lane][i];
                            }
                        }
                }
        }
        for (int warp = 0; warp < 8; ++warp)
            for (int lane = 0; lane < 32; ++lane)
                for (int i = 0; i < kTokens / 4; ++i)
                    for (int n = 0; n < 4; ++n)
                        problem.add(tile.first_token + (i >> 1) * 8 + accumulator_token(lane, i & 1),
                                    tile.first_column + warp * 32 + backward_in(lane, 0, 0) + n,
                                    sums[warp][n >> 1][lane][(i >> 1) * 4 + (i & 1) + (n & 1) * 2]);
    });
}

int failures = 0;

template <class Kernel>
void check(const char* name, int tokens, bool is_backward, bool exact, Kernel&& kernel) {
    const struct {
        int64_t rows, out, in;
        int block_shift, slice_steps;
    } shapes[] = {{tokens, 128, 128, 6, 1},
                  {tokens - 3, 136, 64, 6, 2},
                  {tokens + 1, 40, 448, 6, 2},
                  {1, 264, 384, 7, 1},
                  {tokens / 2, 72, 512, 8, 3}};
    for (const auto& shape : shapes) {
        Problem<Dtype::kBFloat16> problem(shape.rows, shape.out, shape.in, shape.block_shift, is_backward, exact);
        const int64_t total = steps_of(problem.depth(), is_backward ? Backward::kStep : Forward::kStep);
        const GemmPlan plan{tokens, static_cast<int>(steps_of(total, shape.slice_steps)), shape.slice_steps};
        kernel(problem, plan);
        if (!problem.right(plan.slices)) {
            printf("FAILED %s, %d tokens: %ld x %ld x %ld\n", name, tokens, long(shape.rows), long(shape.out),
                   long(shape.in));
            ++failures;
        }
    }
    printf("%s, %d tokens\n", name, tokens);
}

template <int kTokens>
void check_all() {
    const auto sm80 = [](auto& problem, const GemmPlan& plan) { forward_sm80<kTokens>(problem, plan); };
    const auto sm90 = [](auto& problem, const GemmPlan& plan) { forward_sm90<kTokens>(problem, plan); };
    const auto back80 = [](auto& problem, const GemmPlan& plan) { backward<kTokens, false>(problem, plan); };
    const auto back90 = [](auto& problem, const GemmPlan& plan) { backward<kTokens, true>(problem, plan); };
    if constexpr (kTokens <= 64) {
        check("forward sm80", kTokens, false, false, sm80);
        check("backward sm80", kTokens, true, true, back80);
    }
    check("forward sm90", kTokens, false, kTokens >= 128, sm90);
    if constexpr (kTokens <= 128) check("backward sm90", kTokens, true, true, back90);
}

}  // namespace peftkern

int main() {
    using namespace peftkern;
    check_all<16>();
    check_all<32>();
    check_all<64>();
    check_all<128>();
    check_all<256>();
    return failures != 0;
}
