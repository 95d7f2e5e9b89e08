#include "cpu/engine.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "common/check.h"
#include "cpu/isa.h"
#include "cpu/quantize_host.h"

namespace peftkern {
namespace {

using torch::headeronly::ScalarType;

const GemmKernels* const kLevels[kIsaCount] = {&peftkern_gemm_scalar, &peftkern_gemm_avx2, &peftkern_gemm_avx512,
                                               &peftkern_gemm_avx512bf16};
std::atomic<int64_t> tiles_run[kIsaCount];
constexpr int64_t kWorkspacePage = 4096;

int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
int64_t round_up(int64_t a, int64_t b) {
    return divide_up(a, b) * b;
}

bool is_floating(ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

Dtype dtype_of(ScalarType type) {
    if (type == ScalarType::BFloat16) return Dtype::kBFloat16;
    return type == ScalarType::Half ? Dtype::kFloat16 : Dtype::kFloat32;
}

// The stride between rows if all leading dimensions are one, -1 if they are not.
int64_t row_stride(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    if (t.size(last) > 1 && t.stride(last) != 1) return -1;
    int64_t stride = -1, expected = 0;
    for (int64_t i = last - 1; i >= 0; --i) {
        if (t.size(i) == 1) continue;
        if (stride < 0)
            stride = t.stride(i);
        else if (t.stride(i) != expected)
            return -1;
        expected = t.stride(i) * t.size(i);
    }
    return stride < 0 ? t.size(last) : stride;
}

Tensor matching(const char* op, const char* name, const Tensor& tensor, ScalarType type, int64_t numel) {
    PEFTKERN_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
    check_part(op, name, tensor, type, numel);
    return torch::stable::contiguous(tensor);
}

// Memory of this thread for one tile; grows, and lives as long as the thread. Null if there is none.
void* workspace(size_t bytes) {
    thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
    thread_local size_t size = 0;
    if (size < bytes) {
        size = 0;
        memory.reset();
        memory.reset(std::aligned_alloc(kWorkspacePage, bytes));
        if (memory) size = bytes;
    }
    return memory.get();
}

// Fewer rows of a tile than this pay too much for packing the weight. Tiles differ by a step and the last may lack some
// rows, so that each has at least 25: 24 or fewer would take the kernel for few rows, whose last bits differ, and the
// bits must not depend on the number of threads.
constexpr int64_t kLeastSharedRows = 32;

// Where part i of `parts` begins, in whole steps: no two parts differ by more than one.
int64_t part_begin(int64_t size, int64_t step, int64_t parts, int64_t i) {
    return std::min(size, divide_up(size, step) * i / parts * step);
}

std::vector<Tile> tiles_of(const Gemm& gemm, int64_t threads) {
    const int64_t most_columns = divide_up(gemm.n, kTileColumnStep);
    int64_t row_tiles = divide_up(gemm.m, kTileRows);
    // Where the columns are too few to share: rows, as long as a thread gets enough of them.
    if (row_tiles * most_columns < threads)
        row_tiles = std::max(row_tiles, std::min(threads, gemm.m / kLeastSharedRows));
    // As many columns' tiles as give every thread the same number.
    const int64_t fair = round_up(divide_up(gemm.n, kTileColumns), threads / std::gcd(row_tiles, threads));
    const int64_t column_tiles = std::min(most_columns, fair);
    std::vector<Tile> tiles;
    for (int64_t i = 0; i < row_tiles; ++i)
        for (int64_t j = 0; j < column_tiles; ++j)
            tiles.push_back({part_begin(gemm.m, kTileRowStep, row_tiles, i),
                             part_begin(gemm.m, kTileRowStep, row_tiles, i + 1),
                             part_begin(gemm.n, kTileColumnStep, column_tiles, j),
                             part_begin(gemm.n, kTileColumnStep, column_tiles, j + 1)});
    return tiles;
}

// A pass over fewer elements is not worth another thread.
constexpr int64_t kGrainElements = 1 << 15;
// Columns of one call of scale_columns: whole cache lines, and enough calls for all threads.
constexpr int64_t kPassColumns = 256;
static_assert(kPassColumns <= kTileColumns && kPassColumns % kTileColumnStep == 0, "what scale_columns takes");

const GemmKernels& level_in_use(const char* op) {
    std::string error;
    const Isa isa = current_isa(&error);
    PEFTKERN_CHECK(error.empty(), op, ": ", error);
    return *kLevels[static_cast<int>(isa)];
}

void count_tiles(const GemmKernels& kernels, int64_t tiles) {
    for (int i = 0; i < kIsaCount; ++i)
        if (kLevels[i] == &kernels) tiles_run[i] += tiles;
}

Contraction term(const Matrix& x, const Matrix& w, int64_t depth, bool transposed) {
    Contraction c = {};
    c.depth = depth;
    c.x = x;
    c.x_scale = 1;
    c.weight = w;
    c.weight_transposed = transposed;
    return c;
}

Contraction term(const Matrix& x, const Weight& w, bool transposed) {
    const int64_t depth = transposed ? w.in_features : w.out_features;
    Contraction c = term(x, w.dense.matrix, depth, transposed != w.dense_transposed);
    if (w.is_nf4) c.nf4 = &w.nf4;
    c.bf16_dot = x.dtype == Dtype::kBFloat16 && (w.is_nf4 || w.dense.matrix.dtype == Dtype::kBFloat16);
    return c;
}

}  // namespace

Rows rows_of(const char* op, const char* name, const Tensor& tensor) {
    check_dtype(op, name, tensor, is_floating(tensor.scalar_type()), "fp32, bf16 or fp16");
    check_shape(op, name, tensor, tensor.dim() > 0, "[..., features]");
    Rows rows{tensor, {}, 0, tensor.size(tensor.dim() - 1)};
    rows.rows = 1;
    for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows.rows *= tensor.size(i);
    int64_t stride = row_stride(tensor);
    if (stride < 0) {
        rows.tensor = torch::stable::contiguous(tensor);
        stride = rows.columns;
    }
    rows.matrix = {rows.tensor.const_data_ptr(), stride, dtype_of(tensor.scalar_type())};
    return rows;
}

Weight Weight::of(const char* op, const WeightParts& parts) {
    Weight w = {};
    w.out_features = parts.out_features;
    w.in_features = parts.in_features;
    const Tensor& first = parts.tensors[0];
    if (parts.format == kDenseFormat) {
        const bool right = first.dim() == 2 && first.size(0) == w.out_features && first.size(1) == w.in_features;
        check_shape(op, "weight", first, right, parts.shape());
        w.dense_transposed = row_stride(first) < 0 && first.stride(0) == 1;
        w.dense = rows_of(op, "weight", w.dense_transposed ? torch::stable::transpose(first, 0, 1) : first);
        return w;
    }
    const int64_t numel = w.out_features * w.in_features, blocks = divide_up(numel, parts.block_size);
    const ScalarType scale_type = parts.nested() ? ScalarType::Byte : ScalarType::Float;
    w.is_nf4 = true;
    w.codes = matching(op, "codes", first, ScalarType::Byte, divide_up(numel, 2));
    w.absmax = matching(op, "absmax", parts.tensors[1], scale_type, blocks);
    w.nf4 = {w.codes.const_data_ptr<uint8_t>(),
             w.absmax.const_data_ptr(),
             nullptr,
             nullptr,
             0,
             parts.block_size,
             w.in_features};
    if (parts.nested()) {
        w.nested_absmax =
            matching(op, "nested_absmax", parts.tensors[2], ScalarType::Float, divide_up(blocks, kNestedBlockSize));
        w.nested_quant_map = matching(op, "nested_quant_map", parts.tensors[3], ScalarType::Float, kNestedMapSize);
        w.nf4.nested_absmax = w.nested_absmax.const_data_ptr<float>();
        w.nf4.nested_quant_map = w.nested_quant_map.const_data_ptr<float>();
        w.nf4.offset = *matching(op, "offset", parts.tensors[4], ScalarType::Float, 1).const_data_ptr<float>();
    }
    return w;
}

Weight Weight::of(const char* op, const Tensors& w, const Integers& wf) {
    return of(op, weight_of(op, w, wf));
}

Dropout dropout_of(const char* op, double dropout_p, const OptionalTensor& seed) {
    PEFTKERN_CHECK(dropout_p >= 0 && dropout_p <= 1, op, ": dropout_p must be from 0 to 1, got ", dropout_p);
    if (!seed.has_value()) return {0, 0, 1.0f, nullptr};
    const Tensor value = matching(op, "seed", *seed, ScalarType::Long, 1);
    const auto dropped = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536));
    const float keep_scale = dropped < 65536 ? static_cast<float>(65536.0 / (65536.0 - dropped)) : 0.0f;
    return {static_cast<uint64_t>(*value.const_data_ptr<int64_t>()), dropped, keep_scale, nullptr};
}

Contraction times_transposed(const Matrix& x, const Matrix& w, int64_t depth) {
    return term(x, w, depth, true);
}
Contraction times_transposed(const Matrix& x, const Weight& w) {
    return term(x, w, true);
}
Contraction times(const Matrix& x, const Matrix& w, int64_t depth) {
    return term(x, w, depth, false);
}
Contraction times(const Matrix& x, const Weight& w) {
    return term(x, w, false);
}

Tensor bias_of(const char* op, const OptionalTensor& bias, int64_t out_features) {
    if (!bias.has_value()) return Tensor();
    check_dtype(op, "bias", *bias, is_floating(bias->scalar_type()), "fp32, bf16 or fp16");
    check_shape(op, "bias", *bias, bias->dim() == 1 && bias->size(0) == out_features,
                "[" + std::to_string(out_features) + "]");
    return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

Gemm gemm_into(const Tensor& out, int64_t m, int64_t n) {
    Gemm gemm = {};
    gemm.m = m;
    gemm.n = n;
    gemm.out = out.mutable_data_ptr();
    gemm.out_stride = n;
    gemm.out_dtype = dtype_of(out.scalar_type());
    return gemm;
}

void add(Gemm& gemm, const Contraction& contraction) {
    gemm.contractions[gemm.contraction_count++] = contraction;
}

void run(const char* op, const Gemm& gemm) {
    run(op, std::vector<Gemm>{gemm});
}

void run(const char* op, const std::vector<Gemm>& gemms) {
    const GemmKernels& kernels = level_in_use(op);
    struct Part {
        const Gemm* gemm;
        Tile tile;
    };
    std::vector<Part> parts;
    size_t bytes = 0;
    const int64_t threads = torch::stable::get_num_threads();
    for (const Gemm& gemm : gemms) {
        if (gemm.m == 0 || gemm.n == 0) continue;
        for (const Tile& tile : tiles_of(gemm, threads)) parts.push_back({&gemm, tile});
        bytes = std::max(bytes, kernels.workspace_bytes(&gemm));
    }
    bytes = static_cast<size_t>(round_up(static_cast<int64_t>(bytes), kWorkspacePage));
    // Tiles of several gemms take different times: whichever thread is free takes the next.
    std::atomic<size_t> next{0};
    const int64_t workers = std::min<int64_t>(threads, static_cast<int64_t>(parts.size()));
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
        void* memory = workspace(bytes);
        if (!memory) return;
        for (size_t i = next++; i < parts.size(); i = next++) kernels.run(parts[i].gemm, &parts[i].tile, memory);
    });
    PEFTKERN_CHECK(next >= parts.size(), op, ": no memory for a workspace of ", bytes, " bytes");
    count_tiles(kernels, static_cast<int64_t>(parts.size()));
}

void split_dropout(const char* op, const SplitDropout& pass, int64_t rows) {
    const GemmKernels& kernels = level_in_use(op);
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, pass.columns));
    torch::stable::parallel_for(0, rows, grain,
                                [&](int64_t begin, int64_t end) { kernels.split_dropout(&pass, begin, end); });
    count_tiles(kernels, 1);
}

void scale_columns(const char* op, const ScaleColumns& pass, int64_t columns) {
    const GemmKernels& kernels = level_in_use(op);
    const int64_t blocks = divide_up(columns, kPassColumns);
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (kPassColumns * std::max<int64_t>(1, pass.rows)));
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            kernels.scale_columns(&pass, i * kPassColumns, std::min((i + 1) * kPassColumns, columns));
    });
    count_tiles(kernels, blocks);
}

void gated_activation(const char* op, const GatedActivation& pass, int64_t elements) {
    const GemmKernels& kernels = level_in_use(op);
    torch::stable::parallel_for(0, elements, kGrainElements,
                                [&](int64_t begin, int64_t end) { kernels.gated_activation(&pass, begin, end); });
    count_tiles(kernels, 1);
}

void sum_rows(const char* op, const SumRows& pass, int64_t rows) {
    const GemmKernels& kernels = level_in_use(op);
    const int64_t elements = (rows + pass.offsets[rows]) * pass.columns;
    const int64_t grain = std::max<int64_t>(1, kGrainElements * rows / std::max<int64_t>(1, elements));
    torch::stable::parallel_for(0, rows, grain,
                                [&](int64_t begin, int64_t end) { kernels.sum_rows(&pass, begin, end); });
    count_tiles(kernels, 1);
}

void run(const char* op, const CrossEntropy& pass, void (*GemmKernels::*kernel)(const CrossEntropy*, int64_t, int64_t),
         int64_t rows) {
    const GemmKernels& kernels = level_in_use(op);
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, pass.columns));
    torch::stable::parallel_for(0, rows, grain,
                                [&](int64_t begin, int64_t end) { (kernels.*kernel)(&pass, begin, end); });
    count_tiles(kernels, 1);
}

void activate(const char* op, const Activate& pass, int64_t elements) {
    const GemmKernels& kernels = level_in_use(op);
    torch::stable::parallel_for(0, elements, kGrainElements,
                                [&](int64_t begin, int64_t end) { kernels.activate(&pass, begin, end); });
    count_tiles(kernels, 1);
}

Isa level_for(const char* op, int64_t tiles) {
    const GemmKernels& kernels = level_in_use(op);
    count_tiles(kernels, tiles);
    return static_cast<Isa>(std::find(kLevels, kLevels + kIsaCount, &kernels) - kLevels);
}

Tensor empty_with_columns(const Tensor& like, int64_t columns) {
    std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
    sizes.back() = columns;
    return torch::stable::new_empty(like, sizes);
}

Tensor empty_fp32(const Tensor& like, int64_t rows, int64_t columns) {
    return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}

// How many tiles the level `isa` has run in this process: what tests prove a level's use with.
int64_t cpu_tiles_run(std::string isa) {
    for (int i = 0; i < kIsaCount; ++i)
        if (isa == isa_name(static_cast<Isa>(i))) return tiles_run[i];
    PEFTKERN_CHECK(false, "cpu_tiles_run: unknown level ", isa);
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CompositeExplicitAutograd, m) {
    m.impl("cpu_tiles_run", TORCH_BOX(&cpu_tiles_run));
}

}  // namespace peftkern
