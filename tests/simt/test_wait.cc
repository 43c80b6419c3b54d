// A wait for a rank on another node, whose words may overtake each other on their way.
#include <string>

#include "cpp/suite.h"
#include "simt/cuda.h"
#include "simt/simt.h"
// In this order: it needs the includes above.
#include "cuda/worker.cuh"

namespace commlib::testing {
namespace {

constexpr uint32_t kEpoch = 7;
constexpr Call kCall{OpKind::combine, 0, 0};

// Rank 0, which waits, and what rank 1 has published to it.
struct Waiter {
  Signals signals[2]{};
  cuda::DeviceState state{};
  cuda::HostState host{};
  cuda::OpParams op{};
  bool ok = false;
  uint64_t begun = 0, ended = 0;  // its lanes

  Waiter() {
    op.peers.size = 2;
    op.peers.near = 1;  // rank 1 is on another node
    for (PeerBlock& block : op.peers.peer) block.signals = signals;
    op.call = kCall;
    op.number = kEpoch;
    state.sequence.ended = state.sequence.begun = kEpoch - 1;
    host.timeout_ns = 60'000'000'000;
    op.state = &state;
    op.host = &host;
  }
};

// Rank 1 has done its part and closed. The word that it has closed comes first; its call comes `steps` of the
// simulation after rank 0 begins to look why its wait does not end, and its rows last.
void wait_for_words_that_overtake(Waiter& waiter, uint64_t seed, uint64_t steps) {
  simt::Config config;
  config.seed = seed;
  simt::Simulation gpu(config);
  gpu.launch(0, 1, cuda::kWarpLanes, cuda::kBlockSharedBytes + cuda::WarpShared::bytes(0), [&] {
    const cuda::WarpWorker w(waiter.op);
    w.begin(cuda::Does::move_rows);
    simt::add_release(&waiter.begun, 1);
    const bool ok = w.await([&] { return w.read(&waiter.signals[1].pulled) == 1; }, 1,
                            [] { return bit_of(1); }, Phase::arrival);
    const bool all = w.all(ok);
    if (w.lane() == 0) waiter.ok = all;
    simt::add_release(&waiter.ended, 1);
  });
  gpu.launch(1, 1, 1, 0, [&] {
    ptx::store_release_sys(&waiter.signals[1].departed[0], tagged_half(kClosed, bit_of(1), 0));
    ptx::store_release_sys(&waiter.signals[1].departed[1], tagged_half(kClosed, bit_of(1), 1));
    while (ptx::load_acquire_sys(&waiter.begun) < cuda::kWarpLanes) ptx::nanosleep(20);
    ptx::nanosleep(cuda::kLookNs);
    for (uint64_t i = 0; i < steps; ++i) ptx::store_release_sys(&waiter.signals[1].arrived[0], i);
    ptx::store_release_sys(&waiter.signals[1].calls[kEpoch % kCallRing].word, tagged(kEpoch, kCall.bits()));
    ptx::nanosleep(cuda::kLookNs);
    ptx::store_release_sys(&waiter.signals[1].pulled, 1);
    // Something goes on, or simulated time would leap.
    for (uint64_t i = 1; ptx::load_acquire_sys(&waiter.ended) < cuda::kWarpLanes; ++i) {
      ptx::store_release_sys(&waiter.signals[1].arrived[0], i);
    }
  });
  const simt::Result result = gpu.run();
  check_equal(result.error, std::string(), "error");
}

void no_wait_is_given_up_without_a_record() {
  int ended_well = 0, given_up = 0;
  for (uint64_t round = 0; round < 200; ++round) {
    Waiter waiter;
    wait_for_words_that_overtake(waiter, seed() + round, round * 20);
    const bool recorded = waiter.host.failed != 0;
    check(waiter.ok != recorded, "a wait ends well, or says why not");
    if (recorded) {
      check(waiter.host.record.cause == Cause::departed, "the cause is that rank 1 left");
      check_equal(waiter.host.record.peer, 1, "who is to blame");
    }
    ++(recorded ? given_up : ended_well);
  }
  check(ended_well > 0 && given_up > 0, "words came in time and too late");
}

const Suite suite({
    {"no_wait_is_given_up_without_a_record", no_wait_is_given_up_without_a_record},
});

}  // namespace
}  // namespace commlib::testing
