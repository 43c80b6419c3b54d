// A dispatch in waves: the same rows at the same positions, the first experts' sooner.
#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

Asked in_waves() {
  Asked asked;
  asked.waves = true;
  return asked;
}

// Waits for each expert in turn, or for the last one only; then for all rows.
void check_in_waves(Rank& self, const Scenario& s) {
  Manner manner;
  manner.async = true;
  manner.zero_copy = self.random.one_in(2);
  const DispatchedPtr d = start_dispatch(self, s, manner);
  const auto experts = static_cast<int64_t>(d->room.rows_per_expert.size());
  const bool last_only = experts > 0 && self.random.one_in(3);
  for (int64_t e = last_only ? experts - 1 : 0; e < experts; ++e) {
    check_expert(self, *d, e);
    self.nap_sometimes();
  }
  check_dispatch(*d);
  for (int64_t e = 0; e < experts; ++e) check_expert(self, *d, e);
}

void results_are_those_of_a_dispatch_without_waves() {
  Random random(120);
  for (int round = 0; round < rounds(128); ++round) {
    const int ranks = 1 + round % 4;
    std::vector<Config> configs(ranks, small_config(ranks));
    const int64_t experts = 1 + random.below(6 * ranks);  // also fewer than ranks, and than waves on each
    const int topk = 1 + static_cast<int>(random.below(5));
    const bool narrow = random.one_in(3);
    const int64_t grouped_rows = random_room(random);
    for (Config& c : configs) {
      c.experts = experts;
      c.topk = topk;
      c.grouped_rows = grouped_rows;
      c.num_sms = 1 + static_cast<int>(random.below(3));
      if (narrow) c.capacity = 8;
    }
    Asked asked = in_waves();
    asked.drop = narrow;
    asked.weights = random.one_in(2);
    const Scenario s = random_scenario(configs[0], ranks, asked, random);
    in_ranks(configs, [&](Rank& self) {
      for (int i = 0; i < 3; ++i) check_in_waves(self, s);
    });
  }
}

void waves_and_other_operations_take_turns() {
  Random random(121);
  Config config = small_config(3);
  config.experts = 15;
  config.topk = 4;
  config.num_sms = 2;
  config.slots = 4;
  const Scenario plain = random_scenario(config, 3, {}, random);
  const Scenario waves = random_scenario(config, 3, in_waves(), random);
  const Scenario again = with_other_values(waves, random);
  in_ranks(config, 3, [&](Rank& self) {
    for (int i = 0; i < 3; ++i) {
      check_in_waves(self, waves);
      check_round_trip(self, plain, plain, random_manner(self.random));
      check_round_trip(self, waves, again, {});
    }
  });
}

// A rank's tokens, each with the experts given.
RankCase tokens_for(const std::vector<int64_t>& ids, int64_t tokens) {
  RankCase r;
  r.tokens = tokens;
  r.grouped = true;
  r.align = 2;
  for (int64_t t = 0; t < tokens; ++t) r.topk_idx.insert(r.topk_idx.end(), ids.begin(), ids.end());
  return r;
}

// Four experts on each of two ranks, so one in each wave. Rank 1's rows for rank 0 are all for its last
// expert, and take more than a second.
Scenario slow_in_the_last_wave(Random& random, std::vector<Config>* configs) {
  Config config = small_config(2);
  config.experts = 8;
  Scenario s{config, in_waves(), {}};
  s.ranks.push_back(tokens_for({0, 2}, 5));
  s.ranks.push_back(tokens_for({3, -1}, 4));
  complete(s, random);
  configs->assign(2, config);
  (*configs)[1].link_gbps = static_cast<double>(s.row_bytes()) / 0.4e9;  // 0.4 seconds a row
  return s;
}

void the_first_experts_need_not_wait_for_rows_of_the_last() {
  Random random(122);
  for (int workers = 1; workers <= 3; workers += 2) {
    std::vector<Config> configs;
    const Scenario s = slow_in_the_last_wave(random, &configs);
    for (Config& c : configs) c.num_sms = workers;
    in_ranks(configs, [&](Rank& self) {
      Manner manner;
      manner.async = true;
      const DispatchedPtr d = start_dispatch(self, s, manner);
      if (self.rank == 0) {
        for (const int64_t e : {2, 0, 1}) check_expert(self, *d, e);
        check(!is_done(*self.comm, d->under_way.ticket()), "the last expert's rows are still under way");
        check_expert(self, *d, 3);
      }
      check_dispatch(*d);
    });
  }
}

// Rank 1 has published its counts, and then sends nothing.
void waiting_for_an_expert_of_a_failed_dispatch_throws_its_failure() {
  Random random(123);
  for (const bool late : {false, true}) {  // at once, or at the deadline
    Config config = small_config(2);
    config.num_sms = 2;
    config.timeout = late ? 0.4 : 60;
    const Scenario s = random_scenario(config, 2, in_waves(), random);
    in_ranks(config, 2, [&](Rank& self) {
      if (self.rank == 0) {
        Manner manner;
        manner.async = true;
        const DispatchedPtr d = start_dispatch(self, s, manner);
        const auto wait = [&] { check_expert(self, *d, 0); };
        const Failure failure = check_throws<CommFailure>(wait, "a wait for rows that do not come").failure;
        check(failure.peers() == std::vector<int>{1}, "the rank at fault is named");
      } else {
        const RoutingRoom room(s, 1);
        const auto pending = self.comm->begin_dispatch(room.view, true, false, true);
        if (!late) self.comm->give_up("out of memory");
        self.meet();
      }
      if (self.rank == 0) self.meet();
    });
  }
}

void ranks_that_disagree_on_waves_are_a_mismatch_on_all() {
  Random random(124);
  const Config config = small_config(3);
  const Scenario waves = random_scenario(config, 3, in_waves(), random);
  Scenario plain = with_other_values(waves, random);
  plain.asked.waves = false;
  in_ranks(config, 3, [&](Rank& self) {
    const auto call = [&] { start_dispatch(self, self.rank == 1 ? plain : waves, {}); };
    const Failure failure = check_throws<CommFailure>(call, "a dispatch with disagreement").failure;
    check_equal(static_cast<int>(failure.record.cause), static_cast<int>(Cause::mismatch), "the cause");
    check_contains(describe(failure), "in_waves", "the text");
    self.meet();
  });
}

const Suite suite({{"results_are_those_of_a_dispatch_without_waves",
                    results_are_those_of_a_dispatch_without_waves},
                   {"waves_and_other_operations_take_turns", waves_and_other_operations_take_turns},
                   {"the_first_experts_need_not_wait_for_rows_of_the_last",
                    the_first_experts_need_not_wait_for_rows_of_the_last},
                   {"waiting_for_an_expert_of_a_failed_dispatch_throws_its_failure",
                    waiting_for_an_expert_of_a_failed_dispatch_throws_its_failure},
                   {"ranks_that_disagree_on_waves_are_a_mismatch_on_all",
                    ranks_that_disagree_on_waves_are_a_mismatch_on_all}});

}  // namespace
}  // namespace commlib::testing
