// Ranks on several nodes: the same rows as on one, sums with one rounding for each node, whatever the network
// does.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "operations.h"
#include "slow_network.h"
#include "suite.h"

namespace commlib::testing {
namespace {

// Small chunks and rings, so that there are many, and back-pressure all the time.
Config on_nodes(const std::vector<int>& node_of, bool hierarchical, Random& random) {
  Config config = small_config(static_cast<int>(node_of.size()));
  config.net.node_of = node_of;
  config.net.hierarchical = hierarchical;
  config.net.chunk_bytes = 400 + 64 * static_cast<int64_t>(random.below(8));
  config.net.chunks = int64_t{1} << random.below(3);
  config.slots = 4;  // two receive slots kept, one lent, one at work
  config.topk = 1 + static_cast<int>(random.below(4));
  config.hidden = random.one_in(3) ? 37 : 32;
  return config;
}

std::vector<Config> with_workers(const Config& config, Random& random) {
  std::vector<Config> configs(config.net.node_of.size(), config);
  for (Config& c : configs) c.num_sms = 1 + static_cast<int>(random.below(3));
  return configs;
}

void round_trips(const std::vector<int>& node_of, Random& random) {
  const int ranks = static_cast<int>(node_of.size());
  for (const bool hierarchical : {true, false}) {
    for (int i = 0; i < rounds(6); ++i) {
      Config config = on_nodes(node_of, hierarchical, random);
      config.dtype = static_cast<DType>(random.below(kNumDTypes));
      Asked asked;
      asked.weights = random.one_in(2);
      asked.weight_grads = random.one_in(2);
      const Scenario first = random_scenario(config, ranks, asked, random);
      const Scenario second = with_other_values(first, random);
      in_ranks(with_workers(config, random),
               [&](Rank& self) { check_round_trip(self, first, second, random_manner(self.random)); });
    }
  }
}

void two_nodes_of_two() {
  Random random(300);
  round_trips({0, 0, 1, 1}, random);
}

void nodes_of_different_sizes() {
  Random random(301);
  round_trips({0, 0, 0, 1}, random);
  round_trips({0, 1, 1, 2, 2}, random);
}

void nodes_whose_ranks_do_not_lie_side_by_side() {
  Random random(302);
  round_trips({0, 1, 0, 1}, random);
  round_trips({2, 0, 1, 0, 2, 1}, random);
}

void each_rank_on_a_node_of_its_own() {
  Random random(303);
  round_trips({0, 1, 2}, random);
}

// In one dispatch, and its combine: chunks never outgrow the rings.
void memory_under_way_is_bounded() {
  Random random(304);
  Config config = on_nodes({0, 0, 1, 1}, true, random);
  config.max_tokens = 60;
  config.capacity = 4 * config.max_tokens;
  config.net.chunks = 2;
  const Scenario s = random_scenario(config, 4, {}, random);
  in_ranks(config, 4, [&](Rank& self) {
    check_round_trip(self, s, s, {});
    self.meet();
    const int64_t queues = std::min(16, self.comm->address().workers);
    const auto ring =
        static_cast<size_t>(queues * config.net.chunks * align_up(config.net.chunk_bytes, kRowAlign));
    check(self.net->most_under_way() <= 2 * ring, "no more than two channels' rings to any rank");
  });
}

void a_cut_link_that_is_mended_loses_nothing() {
  Random random(305);
  const Config config = on_nodes({0, 0, 1, 1}, true, random);
  std::vector<Scenario> batches;
  for (int i = 0; i < 4; ++i) batches.push_back(random_scenario(config, 4, {}, random));
  in_ranks(config, 4, [&](Rank& self) {
    for (const Scenario& s : batches) {
      self.net->cut(self.rank);
      std::thread later([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        self.net->mend(self.rank);
      });
      check_round_trip(self, s, s, {});
      later.join();
      self.meet();
    }
  });
}

void a_link_that_stays_cut_names_the_ranks_behind_it() {
  Random random(306);
  Config config = on_nodes({0, 0, 1, 1}, true, random);
  config.timeout = 1;
  const Scenario s = random_scenario(config, 4, {}, random);
  in_ranks(config, 4, [&](Rank& self) {
    check_dispatch(*start_dispatch(self, s, {}));
    self.meet();
    if (self.rank == 0) self.net->cut(3);
    self.meet();
    const CommFailure e =
        check_throws<CommFailure>([&] { check_dispatch(*start_dispatch(self, s, {})); }, "nothing comes");
    if (self.rank > 1 || e.failure.record.cause != Cause::timeout) return;  // others may have been faster
    const std::vector<int> peers = e.failure.peers();
    check(std::find(peers.begin(), peers.end(), 3) != peers.end(), e.what());
  });
}

void dies(bool says_so, Random& random) {
  const Config config = on_nodes({0, 0, 1, 1}, true, random);
  const Scenario s = random_scenario(config, 4, {}, random);
  in_ranks(config, 4, [&](Rank& self) {
    check_dispatch(*start_dispatch(self, s, {}));
    self.meet();
    if (self.rank == 3) {
      self.net->kill(3);
      if (says_so) self.comm->give_up("it is dead");
      return self.meet();
    }
    const CommFailure e =
        check_throws<CommFailure>([&] { check_dispatch(*start_dispatch(self, s, {})); }, "rank 3 is gone");
    check(e.failure.record.peer == 3 || e.failure.record.reporter != self.rank, e.what());
    check(e.failure.record.cause == Cause::departed || e.failure.record.cause == Cause::lost, e.what());
    self.meet();
  });
}

void a_rank_that_dies_is_named_at_once() {
  Random random(307);
  dies(true, random);
  dies(false, random);
}

// A token's rows lie on two nodes. One answers, closes and is gone before the other answers.
struct LateAnswer {
  Scenario s;

  explicit LateAnswer(Random& random) {
    Config config = on_nodes({0, 1, 2}, true, random);
    config.topk = 2;
    config.net.chunk_bytes = 4096;
    config.net.chunks = 8;
    s.config = config;
    s.ranks.resize(3);
    RankCase& mine = s.ranks[0];
    mine.tokens = 3;
    const Placement of = s.placement();
    for (int64_t t = 0; t < mine.tokens; ++t)
      mine.topk_idx.insert(mine.topk_idx.end(), {of.first_expert(1), of.first_expert(2)});
    complete(s, random);
  }

  void operator()(Rank& self) const {
    const DispatchedPtr d = start_dispatch(self, s, {});
    check_dispatch(*d);
    self.meet();
    if (self.rank == 0) self.net->withhold_chunks(1, 0, true);
    self.meet();
    check_combine(self, *start_combine(self, *d, s, {}), s);
    if (self.rank != 2) return self.meet();
    arrive(self);
    self.comm->close();
    arrive(self);
    self.net->kill(2);
    std::this_thread::sleep_for(std::chrono::milliseconds(300));  // until all have heard of it
    self.net->withhold_chunks(1, 0, false);
    self.meet();
  }

  static void arrive(const Rank& self) {
    do {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    } while (self.net->has_under_way(self.rank));
  }
};

void a_rank_that_has_answered_and_is_gone_is_not_missed() {
  Random random(309);
  const LateAnswer late(random);
  in_ranks(late.s.config, 3, [&](Rank& self) { late(self); });
}

void run(Rank& self, OpKind kind, const Dispatched& known, const Scenario& values) {
  if (kind == OpKind::dispatch) return check_dispatch(*start_dispatch(self, values, {}));
  if (kind == OpKind::redispatch) return check_redispatch(*start_redispatch(self, known, values, {}));
  check_combine(self, *start_combine(self, known, values, {}), values);
}

// One rank closes as soon as it has done its part, and its earlier words may come after that of its close. So
// an operation of another may fail that could have ended well, but none ever ends with less than all.
struct Early {
  int leaver;
  OpKind kind;
  const Scenario* first;
  const Scenario* second;
  int hold_ms;
  std::atomic<int64_t> overtakings{0};

  void operator()(Rank& self) {
    const DispatchedPtr d = start_dispatch(self, *first, {});
    check_dispatch(*d);
    self.meet();
    if (self.rank == leaver) self.net->hold(leaver, hold_ms);
    self.meet();
    if (self.rank == leaver) {
      run(self, kind, *d, *second);  // no rank leaves before it does
      self.comm->close();
    } else {
      check_ends_well_or_blames_the_leaver(self, *d);
    }
    self.meet();
    if (self.rank != leaver) {
      const CommFailure next = check_throws<CommFailure>(
          [&] { check_dispatch(*start_dispatch(self, *first, {})); }, "a call that the leaver does not make");
      const Cause cause = next.failure.record.cause;
      check(cause == Cause::broken || (cause == Cause::departed && next.failure.record.peer == leaver),
            next.what());
    }
    overtakings = self.net->overtakings();
    self.meet();
  }

  void check_ends_well_or_blames_the_leaver(Rank& self, const Dispatched& known) {
    try {
      run(self, kind, known, *second);
      self.comm->synchronize();
    } catch (const CommFailure& e) {
      const FailureRecord& r = e.failure.record;
      check(r.cause == Cause::departed && r.peer == leaver, e.what());
      check_equal(name_of(r.op), name_of(kind), "the operation");
    }
  }
};

void a_rank_that_closes_early_fails_no_operation_in_silence() {
  Random random(308);
  const std::vector<std::vector<int>> nodes{{0, 0, 1, 1}, {0, 1, 2}, {0, 1, 1}};
  constexpr int kRounds = 64;
  // Longer than a wait takes to ask why it does not end. Where rounds are few, time passes slowly.
  const int hold_ms = 60 * kRounds / rounds(kRounds);
  int64_t overtakings = 0;
  for (int i = 0; i < rounds(kRounds); ++i) {
    const std::vector<int>& node_of = nodes[i % nodes.size()];
    const int ranks = static_cast<int>(node_of.size());
    Config config = on_nodes(node_of, random.one_in(2), random);
    config.net.chunk_bytes = 4096;  // the leaver need not wait until its chunks are taken
    config.net.chunks = 8;
    const Scenario first = random_scenario(config, ranks, {}, random);
    const Scenario second = with_other_values(first, random);
    const auto kind = static_cast<OpKind>(1 + random.below(3));
    Early early{static_cast<int>(random.below(ranks)), kind, &first, &second, hold_ms};
    in_ranks(with_workers(config, random), [&](Rank& self) { early(self); });
    overtakings += early.overtakings;
  }
  check(overtakings > 0, "words overtake each other");
}

const Suite suite({{"two_nodes_of_two", two_nodes_of_two},
                   {"nodes_of_different_sizes", nodes_of_different_sizes},
                   {"nodes_whose_ranks_do_not_lie_side_by_side", nodes_whose_ranks_do_not_lie_side_by_side},
                   {"each_rank_on_a_node_of_its_own", each_rank_on_a_node_of_its_own},
                   {"memory_under_way_is_bounded", memory_under_way_is_bounded},
                   {"a_cut_link_that_is_mended_loses_nothing", a_cut_link_that_is_mended_loses_nothing},
                   {"a_link_that_stays_cut_names_the_ranks_behind_it",
                    a_link_that_stays_cut_names_the_ranks_behind_it},
                   {"a_rank_that_dies_is_named_at_once", a_rank_that_dies_is_named_at_once},
                   {"a_rank_that_has_answered_and_is_gone_is_not_missed",
                    a_rank_that_has_answered_and_is_gone_is_not_missed},
                   {"a_rank_that_closes_early_fails_no_operation_in_silence",
                    a_rank_that_closes_early_fails_no_operation_in_silence}});

}  // namespace
}  // namespace commlib::testing
