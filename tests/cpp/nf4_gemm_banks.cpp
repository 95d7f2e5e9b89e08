// How many words of one bank each shared-memory access of the GEMM kernels asks for at a time: one, everywhere.
#include "cuda/nf4_gemm_load.h"
#include "tensor_core.h"

namespace peftkern {

int failures = 0;

template <class Address>
void check(const char* name, int bytes, Address&& address) {
    int addresses[32];
    for (int lane = 0; lane < 32; ++lane) addresses[lane] = address(lane);
    const int ways = bank_ways(addresses, bytes);
    if (ways != 1) printf("FAILED %s: %d ways\n", name, ways), ++failures;
}

// The quads of the wgmma kernel share addresses: eight pieces of 16 bytes, which one pass can deliver.
void check_quads(const char* name, int warp, int half, int part) {
    std::set<int> banks;
    for (int lane = 0; lane < 32; lane += 4)
        for (int word = 0; word < 4; ++word)
            banks.insert((sm90_code_address(sm90_row(warp, lane), half, part) / 4 + word) % 32);
    if (banks.size() != 32) printf("FAILED %s: %zu banks\n", name, banks.size()), ++failures;
}

void check_tables() {
    for (int trial = 0; trial < 1000; ++trial) {
        const int i = trial % 4;
        uint32_t words[32];
        for (uint32_t& word : words) word = random_bits() ^ random_bits() << 16;
        check("pairs of 16 bits", 4, [&](int lane) { return pair_address(words[lane], i, pair_lane_offset<4>(lane)); });
        check("pairs of 32 bits", 8, [&](int lane) { return pair_address(words[lane], i, pair_lane_offset<8>(lane)); });
        // Byte i of the word chooses the row, the lane its place in it.
        for (int lane = 0; lane < 32; ++lane)
            if (pair_address(words[lane], i, lane * 8) != (words[lane] >> 8 * i & 255) * 256 + lane * 8) ++failures;
    }
    for (int first = 0; first < kPair16Stores; first += 32)
        check("fill of 16 bits", 16, [&](int lane) { return pair16_store_address(first + lane); });
    for (int first = 0; first < kPair32Stores; first += 32)
        check("fill of 32 bits", 16, [&](int lane) { return pair32_store_address(first + lane); });
}

template <int kTokens>
void check_kernels() {
    CudaLinear linear{};
    linear.rows = linear.x_stride = linear.in_features = linear.out_features = 1024;
    const Tile tile{0, 0, 0, 8};
    for (int warp = 0; warp < 8; ++warp) {
        for (int half = 0; half < 2; ++half) {
            for (int row = 0; row < Forward::kTile; row += 8)
                check("codes, mma.sync", 8, [&](int lane) { return sm80_code_address(row + (lane >> 2), half, lane); });
            for (int part = 0; part < 2; ++part) {
                check("codes, wgmma", 16,
                      [&](int lane) { return sm90_code_address(sm90_row(warp, lane), half, part); });
                check_quads("codes of quads, wgmma", warp, half, part);
                for (int column = 0; column < kTokens / 8; ++column)
                    check("tokens, mma.sync", 16,
                          [&](int lane) { return sm80_x_address(kTokens, half, column, lane, part); });
            }
            check("codes, dX", 16, [&](int lane) { return backward_code_address(half, warp, lane); });
            for (int column = 0; column < kTokens / 8; ++column)
                check("tokens, dX", 16, [&](int lane) { return backward_x_address(half, column, lane); });
            for (int m = 0; m < 4; ++m)
                check("scales, dX", 8, [&](int lane) { return backward_scale_index(half, warp, m, lane) * 4; });
        }
        check("scales, wgmma", 4, [&](int lane) { return sm90_row(warp, lane) * 4; });
        for (int i = 0; i < 4; ++i)
            check("result, store", 4, [&](int lane) {
                return tile_index(accumulator_token(lane, i), warp * 16 + accumulator_row(lane, i)) * 4;
            });
        for (int token = 0; token < kTokens; ++token)
            check("result, load", 16, [&](int lane) { return tile_index(token, lane * 4) * 4; });
        // cp.async: thread by thread, the i-th copy of each.
        std::vector<int> forward[32], backward[32];
        for (int lane = 0; lane < 32; ++lane) {
            ForwardLoader<kTokens> a(linear, tile, warp * 32 + lane);
            a.next([&](int to, const void*, bool) { forward[lane].push_back(to); });
            BackwardLoader<kTokens> b(linear, tile, warp * 32 + lane);
            b.next([&](int to, const void*, bool) { backward[lane].push_back(to); });
        }
        for (size_t i = 0; i < forward[0].size(); ++i)
            check("copies, forward", 16, [&](int lane) { return forward[lane][i]; });
        for (size_t i = 0; i < backward[0].size(); ++i)
            check("copies, dX", 16, [&](int lane) { return backward[lane][i]; });
    }
}

}  // namespace peftkern

int main() {
    using namespace peftkern;
    check_tables();
    check_kernels<16>();
    check_kernels<32>();
    check_kernels<64>();
    return failures != 0;
}
