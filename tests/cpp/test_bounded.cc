// Bounded dispatches: plan and rows with no host in between, and operations along what they found.
#include "operations.h"
#include "oversubscribed.h"
#include "suite.h"

namespace commlib::testing {
namespace {

Config random_config(Random& random) {
  Config config = random_grouping(random);
  if (random.one_in(3)) config.grouped_rows = 0;
  return config;
}

void results_are_those_of_a_dispatch_that_the_host_waits_for() {
  Random random(200);
  for (int round = 0; round < rounds(100); ++round) {
    const Config config = random_config(random);
    Asked asked;
    asked.weights = random.one_in(2);
    asked.weight_grads = random.one_in(2);
    asked.bounded = true;
    const Scenario first = random_scenario(config, config.size, asked, random);
    const Scenario second = with_other_values(first, random);
    in_ranks(config, config.size, [&](Rank& self) {
      for (int i = 0; i < 3; ++i) check_round_trip(self, first, second, random_manner(self.random));
    });
  }
}

void they_take_turns_with_others_while_ranks_are_late() {
  Random random(201);
  for (int round = 0; round < rounds(10); ++round) {
    const Config config = random_config(random);
    Scenario s[2] = {random_scenario(config, config.size, {}, random), {}};
    s[1] = with_other_values(s[0], random);
    s[1].asked.bounded = true;
    in_ranks(config, config.size, [&](Rank& self) {
      for (int i = 0; i < 40; ++i) {
        self.nap_sometimes();
        const Scenario& now = s[(i / 3) % 2];
        Manner manner = random_manner(self.random);
        const DispatchedPtr d = start_dispatch(self, now, manner);
        if (i % 2 == 0) check_dispatch(*d);
        if (i % 2 == 1) manner.combine = RowsOf::tensor;  // the rows may be on their way into the slot
        check_combine(self, *start_combine(self, *d, now, manner), now);
      }
    });
  }
}

void rows_past_capacity_are_dropped() {
  Random random(202);
  for (int round = 0; round < 6; ++round) {
    const int ranks = 2 + round % 3;
    Config config = narrow_config(ranks);
    config.num_sms = 1 + round % 3;
    config.slots = 3;
    if (round % 2 == 1) config.capacity = round;
    Scenario s = oversubscribed(config, ranks, true, random, false);
    s.asked.bounded = true;
    in_ranks(config, ranks, [&](Rank& self) { check_round_trip(self, s, s, random_manner(self.random)); });
  }
}

const Suite suite({{"results_are_those_of_a_dispatch_that_the_host_waits_for",
                    results_are_those_of_a_dispatch_that_the_host_waits_for},
                   {"they_take_turns_with_others_while_ranks_are_late",
                    they_take_turns_with_others_while_ranks_are_late},
                   {"rows_past_capacity_are_dropped", rows_past_capacity_are_dropped}});

}  // namespace
}  // namespace commlib::testing
