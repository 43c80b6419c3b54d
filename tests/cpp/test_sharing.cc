// What several layers of a model share: one communicator, in which each calls by a number of its own; and a
// team, whose communicators give up together.
#include <atomic>
#include <chrono>
#include <thread>

#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

// A call and its number among those that share, on one rank; the rest calls `first`.
void numbers_that_differ_are_a_mismatch_on_all(OpKind op) {
  Random random(130);
  Config config = small_config(3);
  config.num_sms = 2;
  const Scenario s = random_scenario(config, 3, {}, random);
  in_ranks(config, 3, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    check_dispatch(*d);
    Manner manner;
    manner.caller = self.rank == 1 ? 255 : 7;
    const auto error = check_throws<CommFailure>([&] { run_operation(self, op, *d, s, manner); },
                                                 "calls of different layers");
    const FailureRecord& record = error.failure.record;
    check_equal(static_cast<int>(record.cause), static_cast<int>(Cause::mismatch), "the cause");
    if (self.rank != 1) {
      check_equal(record.peer, 1, "the rank to blame");
      check_contains(error.what(), std::string("rank 1 called ") + name_of(op), "the text");
      check_contains(error.what(), " of ExpertParallel 255 where", "the text");
    }
    self.meet();
  });
}
void dispatches_of_different_layers_are_a_mismatch() {
  numbers_that_differ_are_a_mismatch_on_all(OpKind::dispatch);
}
void redispatches_of_different_layers_are_a_mismatch() {
  numbers_that_differ_are_a_mismatch_on_all(OpKind::redispatch);
}
void combines_of_different_layers_are_a_mismatch() {
  numbers_that_differ_are_a_mismatch_on_all(OpKind::combine);
}

void a_rank_that_says_no_number_agrees_with_any() {
  Random random(131);
  const Config config = small_config(3);
  const Scenario s = random_scenario(config, 3, {}, random), t = with_other_values(s, random);
  in_ranks(config, 3, [&](Rank& self) {
    for (const int caller : {1, 9, 255}) {
      Manner manner;
      manner.caller = static_cast<uint8_t>(self.rank == 1 ? 0 : caller);
      check_round_trip(self, s, t, manner);
    }
  });
}

// More slots than there used to be, all of them leased and each used.
void calls_name_any_of_255_slots() {
  Random random(132);
  Config config = small_config(2);
  config.slots = kMaxSlots;
  config.max_tokens = 3;
  config.capacity = 6;
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    std::vector<std::shared_ptr<SlotLease>> taken;
    for (int i = 0; i < kMaxSlots - 2 - 3 * self.rank; ++i) taken.push_back(lend_slot(self));
    check_round_trip(self, s, s, {});
    check_equal(self.comm->slots_in_use(), static_cast<int>(taken.size()), "slots in use");
  });
}

// The communicators of each rank have a team of its own.
std::vector<Config> with_teams(int ranks) {
  std::vector<Config> configs(ranks, small_config(ranks));
  for (Config& config : configs) config.team = std::make_shared<Team>();
  return configs;
}

// Rank 1 waits for rank 0 in one communicator, and rank 0 gives up in another.
void who_waits_in_one_communicator_hears_that_another_of_the_team_has_failed() {
  Random random(133);
  const std::vector<Config> configs = with_teams(2);
  const Scenario s = random_scenario(configs[0], 2, {}, random);
  std::atomic<bool> waits{false};
  in_ranks(configs, [&](Rank& self) {
    const auto other = self.another(configs[self.rank]);
    if (self.rank == 1) {
      waits = true;
      const auto error =
          check_throws<CommFailure>([&] { start_dispatch(self, s, {}); }, "a dispatch by itself");
      check_equal(error.failure.record.peer, 0, "the rank to blame");
    } else {
      while (!waits) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      other->give_up("out of memory");
      check(configs[0].team->has_given_up(), "its team knows");
      const auto error = check_throws<CommFailure>([&] { self.comm->lend_slot(); }, "what comes next");
      check_contains(error.what(), "out of memory", "the text");
    }
    self.meet();
  });
}

// One gives up in a thread while another closes: whichever comes first, neither waits for the other.
void communicators_come_and_go_while_their_team_gives_up() {
  const std::vector<Config> configs = with_teams(2);
  in_ranks(configs, [&](Rank& self) {
    for (int i = 0; i < rounds(8); ++i) {
      Config config = configs[self.rank];
      config.team = std::make_shared<Team>();
      const auto stays = self.another(config);
      auto goes = self.another(config);
      std::thread other([&] { stays->give_up("out of memory"); });
      self.nap_sometimes();
      goes->close();
      other.join();
      check_throws<CommFailure>([&] { goes->lend_slot(); }, "what comes next");
      self.meet();
    }
    check(!configs[self.rank].team->has_given_up(), "it is another team's failure");
  });
}

void a_communicator_of_a_team_that_has_given_up_gives_up_at_once() {
  const std::vector<Config> configs = with_teams(2);
  in_ranks(configs, [&](Rank& self) {
    self.comm->give_up("out of memory");
    self.meet();
    const auto late = self.another(configs[self.rank]);
    const auto error = check_throws<CommFailure>([&] { late->lend_slot(); }, "its first call");
    check_contains(error.what(), "out of memory", "the text");
    self.meet();
  });
}

void one_that_closes_leaves_its_team_alone() {
  Random random(134);
  const std::vector<Config> configs = with_teams(2);
  const Scenario s = random_scenario(configs[0], 2, {}, random);
  in_ranks(configs, [&](Rank& self) {
    const auto other = self.another(configs[self.rank]);
    other->close();
    other->give_up("after it has been closed");
    self.meet();
    check_round_trip(self, s, s, {});
    check(!configs[self.rank].team->has_given_up(), "nobody has given up");
  });
}

const Suite suite({
    {"dispatches_of_different_layers_are_a_mismatch", dispatches_of_different_layers_are_a_mismatch},
    {"redispatches_of_different_layers_are_a_mismatch", redispatches_of_different_layers_are_a_mismatch},
    {"combines_of_different_layers_are_a_mismatch", combines_of_different_layers_are_a_mismatch},
    {"a_rank_that_says_no_number_agrees_with_any", a_rank_that_says_no_number_agrees_with_any},
    {"calls_name_any_of_255_slots", calls_name_any_of_255_slots},
    {"who_waits_in_one_communicator_hears_that_another_of_the_team_has_failed",
     who_waits_in_one_communicator_hears_that_another_of_the_team_has_failed},
    {"a_communicator_of_a_team_that_has_given_up_gives_up_at_once",
     a_communicator_of_a_team_that_has_given_up_gives_up_at_once},
    {"communicators_come_and_go_while_their_team_gives_up",
     communicators_come_and_go_while_their_team_gives_up},
    {"one_that_closes_leaves_its_team_alone", one_that_closes_leaves_its_team_alone},
});

}  // namespace
}  // namespace commlib::testing
