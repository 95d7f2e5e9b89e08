// The order of events in the wgmma kernels: who waits for what, who frees what. Host and device: a test runs these
// loops with a recorder for `Ops` and searches every interleaving of producer and consumers.
#pragma once

#include "cuda/nf4_gemm_maps.h"

namespace peftkern {

// A place in the ring of stages and the parity of its current turn.
template <int kStages>
struct Turn {
    int slot = 0;
    uint32_t parity = 0;

    PEFTKERN_BOTH Turn next() const {
        Turn turn = *this;
        if (++turn.slot == kStages) {
            turn.slot = 0;
            turn.parity ^= 1;
        }
        return turn;
    }
};

// Scales are read from global memory this many steps before they are stored, so that their latency (about two steps of
// the fastest tile) is hidden.
constexpr int kScaleLead = 4;

template <int kStages, class Ops>
PEFTKERN_BOTH void produce(int steps, Ops& ops) {
    Turn<kStages> turn;
    PEFTKERN_UNROLLED for (int lead = 0; lead < kScaleLead; ++lead) ops.fetch_scales(lead, lead);
    PEFTKERN_ROLLED for (int first = 0; first < steps; first += kScaleLead) {
        PEFTKERN_UNROLLED for (int lead = 0; lead < kScaleLead; ++lead) {
            const int step = first + lead;
            if (step >= steps) break;
            ops.wait_empty(turn.slot, turn.parity ^ 1);  // the first turn finds every stage empty
            ops.fill(turn.slot, step, lead);
            ops.fetch_scales(lead, step + kScaleLead);
            turn = turn.next();
        }
    }
}

// Few tokens: each block of 64 is multiplied unscaled, and its fp32 result scaled into the sum. The next block's codes
// are decoded while the tensor core works on this one. The last step decodes its own first block again, so that the
// look-ahead needs no branch: a conditional one made ptxas serialise every wgmma.
template <int kStages, class Ops>
PEFTKERN_BOTH void consume_promoted(int steps, Ops& ops) {
    if (steps == 0) return;
    Turn<kStages> turn;
    ops.wait_full(turn.slot, turn.parity);
    ops.template decode<0>(turn.slot);
    PEFTKERN_ROLLED for (int step = 0; step < steps; ++step) {
        const Turn<kStages> following = step + 1 < steps ? turn.next() : turn;
        ops.template multiply<0>(turn.slot);
        ops.template decode<1>(turn.slot);
        ops.template wait_products<0>();
        ops.template promote<0>(turn.slot);
        ops.template multiply<1>(turn.slot);
        ops.wait_full(following.slot, following.parity);
        ops.template decode<0>(following.slot);
        ops.template wait_products<0>();
        ops.template promote<1>(turn.slot);
        ops.release(turn.slot);
        turn = following;
    }
}

// Many tokens, and dX: weights carry their scale, one accumulator over all steps; one half multiplies while the other
// decodes. A stage is freed after the wait that covers its last product.
template <int kStages, class Ops>
PEFTKERN_BOTH void consume_exact(int steps, Ops& ops) {
    if (steps == 0) return;
    Turn<kStages> turn;
    int previous = 0;
    ops.wait_full(turn.slot, turn.parity);
    ops.template decode<0>(turn.slot);
    PEFTKERN_ROLLED for (int step = 0; step < steps; ++step) {
        const Turn<kStages> following = step + 1 < steps ? turn.next() : turn;
        ops.template multiply<0>(turn.slot);
        ops.template wait_products<1>();
        if (step > 0) ops.release(previous);
        ops.template decode<1>(turn.slot);
        ops.template multiply<1>(turn.slot);
        ops.template wait_products<1>();
        ops.wait_full(following.slot, following.parity);
        ops.template decode<0>(following.slot);
        previous = turn.slot;
        turn = following;
    }
    ops.template wait_products<0>();
}

}  // namespace peftkern
