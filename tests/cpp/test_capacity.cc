// More rows than a rank has room for.
#include <atomic>
#include <chrono>
#include <thread>

#include "operations.h"

namespace commlib::testing {
namespace {

// Rank 0 of a crowd would receive every token of every rank.
Scenario crowd(const Config& config, int ranks, bool drop, Random& random) {
  Asked asked;
  asked.drop = drop;
  Scenario s{config, asked, {}};
  for (int p = 0; p < ranks; ++p) {
    RankCase r;
    r.tokens = config.max_tokens;
    for (int64_t t = 0; t < r.tokens; ++t) {
      r.topk_idx.push_back(0);
      for (int k = 1; k < config.topk; ++k) r.topk_idx.push_back(1 + random.below(config.experts - 1));
    }
    r.grouped = drop && random.one_in(2);
    r.align = r.grouped ? 3 : 1;
    s.ranks.push_back(std::move(r));
  }
  complete(s, random);
  return s;
}

Config narrow_config(int ranks) {
  Config config = small_config(ranks);
  config.capacity = config.max_tokens + 3;
  return config;
}

Scenario fitting(Config config, int ranks, Random& random) {
  config.max_tokens = config.capacity / ranks;
  return random_scenario(config, ranks, {}, random);
}

void overflow_is_an_error_on_all_ranks_and_all_may_go_on() {
  Random random(90);
  const Config config = narrow_config(3);
  const Scenario many = crowd(config, 3, false, random);
  const Scenario few = fitting(config, 3, random);
  in_ranks(config, 3, [&](Rank& self) {
    for (int i = 0; i < 5; ++i) {
      std::vector<int64_t> routes(many.ranks[self.rank].tokens * 2);
      RoutingView routing;
      routing.topk_idx = many.ranks[self.rank].topk_idx.data();
      routing.routes = routes.data();
      routing.tokens = many.ranks[self.rank].tokens;
      const auto error = check_throws<CapacityError>([&] { self.comm->begin_dispatch(routing, true, false); },
                                                     "a dispatch past capacity");
      check_contains(error.what(), "rank 0 would receive 36 rows, and capacity is 15", "the text");
      check_equal(self.comm->slots_in_use(), 0, "slots in use");
      self.nap_sometimes();
      check_round_trip(self, few, few, {});
    }
  });
}

void dropped_rows_are_counted_and_the_others_arrive() {
  Random random(91);
  for (int round = 0; round < 6; ++round) {
    const int ranks = 2 + round % 3;
    Config config = narrow_config(ranks);
    config.num_sms = 1 + round % 3;
    config.slots = 3;
    if (round % 2 == 1) config.capacity = round;  // less than one rank's tokens
    const Scenario s = crowd(config, ranks, true, random);
    const Scenario other = with_other_values(s, random);
    int64_t dropped = 0;
    for (const RankCase& r : s.ranks) dropped += r.dropped;
    check(dropped > 0, "the test drops rows");
    in_ranks(config, ranks, [&](Rank& self) {
      for (const bool zero_copy : {false, true}) {
        Manner manner;
        manner.zero_copy = zero_copy;
        check_round_trip(self, s, other, manner);
      }
    });
  }
}

// Rank 1's first nap on its pool's thread lasts until released, as when that thread gets no processor.
std::thread::id caller_of_rank_1;
std::atomic<bool> asleep{false}, released{false};

bool sleep_on_the_pool_thread() {
  if (std::this_thread::get_id() == caller_of_rank_1) return false;
  asleep = true;
  while (!released) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return false;
}

// An operation that is slow on one rank still finds what the others called, however many dispatches have been
// refused for want of capacity since: these hold no slot, so nothing but the protocol bounds how many there
// are.
void a_slow_operation_outlasts_many_refused_dispatches() {
  Random random(92);
  const Config config = narrow_config(2);
  std::vector<Config> configs(2, config);
  for (Config& c : configs) c.timeout = 15;
  configs[1].interrupted = sleep_on_the_pool_thread;
  const Scenario many = crowd(config, 2, false, random);
  const Scenario few = fitting(config, 2, random);
  asleep = released = false;
  const auto is_set = [](const std::atomic<bool>& flag) {
    for (int i = 0; i < 5000 && !flag; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return flag.load();
  };
  std::atomic<bool> refused_all{false};
  in_ranks(configs, [&](Rank& self) {
    if (self.rank == 1) caller_of_rank_1 = std::this_thread::get_id();
    const DispatchedPtr d = start_dispatch(self, few, {});
    check_dispatch(self, *d);
    Manner async;
    async.async = true;
    if (self.rank == 0) check(is_set(asleep), "rank 1's operation is under way");
    const DispatchedPtr slow = start_redispatch(self, *d, few, async);
    if (self.rank == 1) check(is_set(asleep), "rank 1's operation is under way");
    // If refusals were to wait for rank 1's operation, it would have to go on some time.
    std::thread timer;
    if (self.rank == 1) {
      timer = std::thread([&] {
        for (int i = 0; i < 3000 && !refused_all; ++i)
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        released = true;
      });
    }
    const RankCase& r = many.ranks[self.rank];
    std::vector<int64_t> routes(r.tokens * 2);
    RoutingView routing;
    routing.topk_idx = r.topk_idx.data();
    routing.routes = routes.data();
    routing.tokens = r.tokens;
    try {
      for (int i = 0; i < kCallRing + 6; ++i) {
        check_throws<CapacityError>([&] { self.comm->begin_dispatch(routing, true, false); }, "a crowd");
      }
      if (self.rank == 1) refused_all = true;
      if (timer.joinable()) timer.join();
      check_redispatch(self, *slow);
    } catch (...) {
      refused_all = true;
      if (timer.joinable()) timer.join();
      throw;
    }
  });
}

}  // namespace

std::vector<Test> capacity_tests() {
  return {{"overflow_is_an_error_on_all_ranks_and_all_may_go_on",
           overflow_is_an_error_on_all_ranks_and_all_may_go_on},
          {"dropped_rows_are_counted_and_the_others_arrive", dropped_rows_are_counted_and_the_others_arrive},
          {"a_slow_operation_outlasts_many_refused_dispatches",
           a_slow_operation_outlasts_many_refused_dispatches}};
}

}  // namespace commlib::testing
