// Operations of a rank that run on its pool's thread, while its caller goes on.
#include <atomic>
#include <chrono>
#include <thread>

#include "../operations.h"
#include "../oversubscribed.h"
#include "../suite.h"

namespace commlib::testing {
namespace {

// The end of an operation on its pool's thread, which lasts until released, as when that thread gets no
// processor.
std::atomic<bool> asleep{false}, released{false};

void sleep_on_the_pool_thread(void*) {
  asleep = true;
  while (!released) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

// An operation that is slow on one rank still finds what the others called, however many dispatches have been
// refused for want of capacity since: these hold no slot, so only the protocol bounds their number.
void a_slow_operation_outlasts_many_refused_dispatches() {
  Random random(92);
  const Config config = narrow_config(2);
  std::vector<Config> configs(2, config);
  for (Config& c : configs) c.timeout = 15;
  const Scenario many = oversubscribed(config, 2, false, random);
  const Scenario few = fitting(config, 2, random);
  asleep = released = false;
  const auto is_set = [](const std::atomic<bool>& flag) {
    for (int i = 0; i < 5000 && !flag; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return flag.load();
  };
  std::atomic<bool> refused_all{false};
  in_ranks(configs, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, few, {});
    check_dispatch(*d);
    Manner async;
    async.async = true;
    Manner ends_late = async;
    if (self.rank == 1) ends_late.held = Held(&asleep, sleep_on_the_pool_thread);
    // Rank 1's pool must be the last to hold it: the operation ends only once rank 0 has come to it, too.
    if (self.rank == 0) self.meet();
    const DispatchedPtr first = start_redispatch(self, *d, few, ends_late);
    ends_late.held = nullptr;
    if (self.rank == 1) self.meet();
    check(is_set(asleep), "rank 1's pool is held up");
    const DispatchedPtr slow = start_redispatch(self, *d, few, async);
    // So that rank 1's operation goes on at some time, should refusals wait for it.
    std::thread timer;
    if (self.rank == 1) {
      timer = std::thread([&] {
        for (int i = 0; i < 3000 && !refused_all; ++i)
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        released = true;
      });
    }
    try {
      for (int i = 0; i < kCallRing + 6; ++i) refusal(self, many);
      if (self.rank == 1) refused_all = true;
      if (timer.joinable()) timer.join();
      check_redispatch(*first);
      check_redispatch(*slow);
    } catch (...) {
      refused_all = true;
      if (timer.joinable()) timer.join();
      throw;
    }
  });
}

// Combines of rows that lie in one slot share its lease, so no number of slots bounds how many are queued.
// The plan of a rank that is early must not lose its call to theirs.
void a_plan_is_not_far_ahead_of_combines_that_share_a_slot() {
  Random random(133);
  Config config = small_config(2);
  config.slots = 3;
  config.timeout = 20;
  Asked asked;
  asked.may_group = false;
  const Scenario s = random_scenario(config, 2, asked, random);
  in_ranks(config, 2, [&](Rank& self) {
    Manner manner;
    manner.zero_copy = true;
    const DispatchedPtr d = start_dispatch(self, s, manner);
    check_dispatch(*d);
    CombineInput input;
    input.y = d->lease->slot().rows;
    input.stride = s.row_bytes();
    std::vector<Buffer> sums;
    for (int i = 0; i < kCallRing + 9; ++i) sums.emplace_back(d->mine().tokens * s.row_bytes());
    const auto late = [&] {
      if (self.rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
    };
    late();  // the other has queued them all, and begun the dispatch
    std::vector<UnderWay> queued;
    for (const Buffer& out : sums) {
      queued.emplace_back(self, self.comm->combine(input, d->routing, out.data(), nullptr, true));
    }
    late();  // they have run
    check_dispatch(*start_dispatch(self, s, {}));
    for (const UnderWay& combine : queued) combine.wait();
  });
}

const Suite suite({{"a_plan_is_not_far_ahead_of_combines_that_share_a_slot",
                    a_plan_is_not_far_ahead_of_combines_that_share_a_slot},
                   {"a_slow_operation_outlasts_many_refused_dispatches",
                    a_slow_operation_outlasts_many_refused_dispatches}});

}  // namespace
}  // namespace commlib::testing
