// The wgmma kernels' ring of stages: the kernels' own loops are recorded, and every interleaving of the producer, TMA
// and two consumers is searched for a deadlock, a read of what is not there and a write over what is still read. The
// other six consumers run the same loop.
#include "cuda/nf4_gemm_schedule.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <unordered_set>
#include <vector>

namespace peftkern {

enum class Event { kWaitFull, kWaitEmpty, kRead, kRelease, kWrite };
struct Record {
    Event event;
    int slot, value;  // of a wait the parity, else the step
};
using Trace = std::vector<Record>;

[[noreturn]] void fail(const char* what, int stages, int steps) {
    printf("FAILED %s: %d stages, %d steps\n", what, stages, steps);
    exit(1);
}

struct Recorder {
    int stages, steps;
    Trace trace = {};
    int decoded[2] = {}, multiplied[2] = {}, promoted[2] = {}, fetched[kScaleLead] = {};
    std::deque<int> in_flight = {};  // slots that uncommitted waits still read

    void wait_full(int slot, uint32_t parity) { trace.push_back({Event::kWaitFull, slot, int(parity)}); }
    void release(int slot) {
        for (int reading : in_flight)
            if (reading == slot) fail("freed under a product in flight", stages, steps);
        trace.push_back({Event::kRelease, slot, 0});
    }
    template <int kHalf>
    void decode(int slot) {
        const int step = decoded[kHalf]++;
        trace.push_back({Event::kRead, slot, step < steps ? step : steps - 1});
    }
    template <int kHalf>
    void multiply(int slot) {
        if (decoded[kHalf] <= multiplied[kHalf]) fail("multiplied before decoding", stages, steps);
        trace.push_back({Event::kRead, slot, multiplied[kHalf]++});
        in_flight.push_back(slot);
    }
    template <int kInFlight>
    void wait_products() {
        while (in_flight.size() > kInFlight) in_flight.pop_front();
    }
    template <int kHalf>
    void promote(int slot) {
        if (!in_flight.empty()) fail("promoted a product in flight", stages, steps);
        trace.push_back({Event::kRead, slot, promoted[kHalf]++});
    }

    void wait_empty(int slot, uint32_t parity) { trace.push_back({Event::kWaitEmpty, slot, int(parity)}); }
    void fetch_scales(int lead, int step) { fetched[lead] = step; }
    void fill(int slot, int step, int lead) {
        if (fetched[lead] != step) fail("another step's scales", stages, steps);
        trace.push_back({Event::kWrite, slot, step});
    }
};

constexpr int kConsumers = 2;

// 58 bits: places in the traces, and each slot's phases, arrivals and copy in flight.
struct State {
    int producer = 0, consumers[kConsumers] = {};
    int full[8] = {}, empty[8] = {}, arrived[8] = {}, copying[8] = {};

    uint64_t key(int stages) const {
        uint64_t key = producer;
        for (int at : consumers) key = key << 10 | at;
        for (int slot = 0; slot < stages; ++slot)
            key = key << 4 | full[slot] << 3 | empty[slot] << 2 | arrived[slot] << 1 | copying[slot];
        return key;
    }
};

size_t search(const Trace& producer, const Trace& consumer, int stages, int steps) {
    std::unordered_set<uint64_t> seen;
    std::vector<State> open{State()};
    const int ends[2] = {int(producer.size()), int(consumer.size())};
    size_t finished = 0;
    while (!open.empty()) {
        const State state = open.back();
        open.pop_back();
        if (!seen.insert(state.key(stages)).second) continue;
        std::vector<int> content(stages, -1);
        for (int at = 0; at < state.producer; ++at)
            if (producer[at].event == Event::kWrite) content[producer[at].slot] = producer[at].value;
        bool moved = false;
        const auto move = [&](State next) {
            moved = true;
            open.push_back(next);
        };
        for (int slot = 0; slot < stages; ++slot)
            if (state.copying[slot]) {
                State next = state;
                next.copying[slot] = 0, next.full[slot] ^= 1;
                move(next);
            }
        if (state.producer < ends[0]) {
            const Record& record = producer[state.producer];
            State next = state;
            ++next.producer;
            if (record.event == Event::kWrite) {
                if (state.copying[record.slot]) fail("two copies into one stage", stages, steps);
                next.copying[record.slot] = 1;
                move(next);
            } else if (state.empty[record.slot] != record.value) {
                move(next);
            }
        }
        for (int c = 0; c < kConsumers; ++c) {
            if (state.consumers[c] == ends[1]) continue;
            const Record& record = consumer[state.consumers[c]];
            State next = state;
            ++next.consumers[c];
            if (record.event == Event::kWaitFull) {
                if (state.full[record.slot] != record.value) move(next);
            } else if (record.event == Event::kRead) {
                if (content[record.slot] != record.value || state.copying[record.slot])
                    fail("read a stage that does not hold the step", stages, steps);
                move(next);
            } else {
                if (++next.arrived[record.slot] == kConsumers)
                    next.arrived[record.slot] = 0, next.empty[record.slot] ^= 1;
                move(next);
            }
        }
        if (moved) continue;
        if (state.producer != ends[0] || state.consumers[0] != ends[1] || state.consumers[1] != ends[1])
            fail("deadlock", stages, steps);
        ++finished;
    }
    if (finished == 0) fail("no end", stages, steps);
    return seen.size();
}

template <int kStages>
void check() {
    size_t states = 0;
    for (int steps : {0, 1, kStages - 1, kStages, kStages + 1, 3 * kStages + 1})
        for (bool exact : {false, true}) {
            Recorder producer{kStages, steps}, consumer{kStages, steps};
            produce<kStages>(steps, producer);
            if (exact)
                consume_exact<kStages>(steps, consumer);
            else
                consume_promoted<kStages>(steps, consumer);
            for (int half = 0; half < 2; ++half)
                if (consumer.multiplied[half] != steps || (!exact && consumer.promoted[half] != steps))
                    fail("not every step was multiplied", kStages, steps);
            states += search(producer.trace, consumer.trace, kStages, steps);
        }
    printf("%d stages: %zu states\n", kStages, states);
}

}  // namespace peftkern

int main() {
    using namespace peftkern;
    check<2>();
    check<3>();
    check<4>();
    check<5>();
    check<6>();
}
