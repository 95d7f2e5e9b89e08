// The GEMM kernels' own source, launchers and second stage on an emulated device: small integers make every fp32 sum
// exact, so that y is the exact result rounded once.
#include "cuda/nf4_gemm.h"
#include "nf4_gemm_replay.h"

namespace peftkern {

int failures = 0;

template <Dtype kDtype>
void check(const DeviceTraits& traits, bool backward, int tokens, int64_t rows, int64_t out, int64_t in,
           int block_shift, int slice_steps) {
    const bool exact = backward || tokens >= 128;
    Problem<kDtype> problem(rows, out, in, block_shift, backward, exact);
    // The scaled codebook's scale comes off in fp32, which rounds.
    const int64_t columns = problem.columns();
    std::vector<float> bias(columns);
    for (float& value : bias) value = static_cast<float>(random_bits() % 9);
    std::vector<uint16_t> y(rows * columns, 0xffff);
    CudaGemm gemm{problem.linear, {}};
    const int64_t total = steps_of(problem.depth(), backward ? Backward::kStep : Forward::kStep);
    gemm.plan = {tokens, static_cast<int>(steps_of(total, slice_steps)), slice_steps};
    std::vector<float> partials(gemm.plan.slices > 1 ? gemm.plan.slices * y.size() : 0);
    gemm.linear.y = y.data(), gemm.linear.partials = partials.data(), gemm.linear.splits = gemm.plan.slices;
    if (!backward) gemm.linear.epilogue.bias = bias.data(), gemm.linear.epilogue.bias_dtype = Dtype::kFloat32;
    const int error = launch_gemm(gemm, backward, traits, 0, nullptr);
    const std::vector<double> weight = problem.dense();
    int wrong = 0;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column) {
            const double sum = problem.sum(weight, row, column), shown = half_value(y[row * columns + column], kDtype);
            const double unscale = exact ? 1 : double{pair16_unscale<kDtype>()};
            const double wanted = sum * unscale + (backward ? 0 : bias[column]);
            // One rounding of the type, and of fp32 where the scale comes off.
            const double unit = kDtype == Dtype::kBFloat16 ? 0x1p-8 : 0x1p-11;
            const double room = (wanted < 0 ? -wanted : wanted) * unit + (exact ? 0 : 1e-2);
            if (!(shown >= wanted - room && shown <= wanted + room)) ++wrong;
        }
    if (error || wrong) {
        printf("FAILED %d %s, %d tokens, %ld x %ld x %ld: error %d, %d wrong\n", traits.compute_capability,
               backward ? "dX" : "forward", tokens, long(rows), long(out), long(in), error, wrong);
        ++failures;
    }
}

}  // namespace peftkern

int main() {
    using namespace peftkern;
    DeviceTraits sm80{}, sm89{}, sm90{};
    sm80.compute_capability = 80, sm80.shared_bytes = 163 << 10;
    sm89.compute_capability = 89, sm89.shared_bytes = 99 << 10;
    sm90.compute_capability = 90, sm90.shared_bytes = 227 << 10;
    const struct {
        const DeviceTraits& traits;
        bool backward;
        int tokens;
    } kernels[] = {{sm80, false, 16}, {sm80, false, 32},  {sm80, false, 64},  {sm89, false, 32}, {sm80, true, 16},
                   {sm80, true, 32},  {sm80, true, 64},   {sm89, true, 64},   {sm90, false, 16}, {sm90, false, 32},
                   {sm90, false, 64}, {sm90, false, 128}, {sm90, false, 256}, {sm90, true, 16},  {sm90, true, 32},
                   {sm90, true, 64},  {sm90, true, 128}};
    for (const auto& kernel : kernels) {
        const int tokens = kernel.tokens;
        check<Dtype::kBFloat16>(kernel.traits, kernel.backward, tokens, tokens - 3, 136, 960, 6, 99);
        check<Dtype::kFloat16>(kernel.traits, kernel.backward, tokens, tokens + 1, kernel.backward ? 72 : 66, 448, 6,
                               2);
        check<Dtype::kBFloat16>(kernel.traits, kernel.backward, tokens, tokens / 2, 200, 256, 7, 1);
        check<Dtype::kBFloat16>(kernel.traits, kernel.backward, tokens, 0, 136, 256, 6, 99);
        if (!kernel.backward) check<Dtype::kBFloat16>(kernel.traits, false, tokens, 9, 0, 256, 6, 99);
    }
    printf("%zu kernels\n", sizeof kernels / sizeof kernels[0]);
    return failures != 0;
}
