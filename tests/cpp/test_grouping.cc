// Rows that go straight to their places in the groups of their experts, and are pulled from there: the same
// bits as with one row for each rank. Which it is each rank decides for itself, anew in each operation.
#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

Asked all_group(Random& random) {
  Asked asked;
  asked.weights = random.one_in(2);
  asked.weight_grads = random.one_in(2);
  return asked;
}

void each_rank_chooses_for_itself() {
  Random random(160);
  for (int round = 0; round < rounds(100); ++round) {
    const Config config = random_grouping(random);
    const Scenario first = random_scenario(config, config.size, all_group(random), random);
    const Scenario second = with_other_values(first, random);
    in_ranks(config, config.size, [&](Rank& self) {
      for (int i = 0; i < 3; ++i) check_round_trip(self, first, second, random_manner(self.random));
    });
  }
}

void rows_past_capacity_are_dropped_from_their_groups() {
  Random random(161);
  for (int round = 0; round < rounds(40); ++round) {
    Config config = random_grouping(random);
    config.capacity = 1 + random.below(10);
    Asked asked = all_group(random);
    asked.drop = true;
    const Scenario s = random_scenario(config, config.size, asked, random);
    in_ranks(config, config.size,
             [&](Rank& self) { check_round_trip(self, s, s, random_manner(self.random)); });
  }
}

void every_vector_path_rounds_the_sum_of_each_rank() {
  Random random(162);
  for (const std::string& name : vector_paths()) {
    for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
      for (const int64_t hidden : {1, 31, 96, 160, 2080}) {
        Config config = small_config(2);
        config.vector_ops = name;
        config.dtype = static_cast<DType>(dtype);
        config.hidden = hidden;
        config.topk = 4;
        config.experts = 8;
        config.grouped_rows = 1000;
        config.slots = 3;
        Manner manner;
        manner.combine = RowsOf::lent_slot;
        const Scenario s = random_scenario(config, 2, {}, random);
        in_ranks(config, 2, [&](Rank& self) { check_round_trip(self, s, s, manner); });
      }
    }
  }
}

// A worker sums many tokens in turn, some from grouped rows and some not: what it keeps from sum to sum, such
// as how far the ring of its loads has turned, serves both.
void sums_of_both_kinds_follow_each_other() {
  Random random(164);
  Config config = small_config(2);
  config.num_sms = 1;
  config.experts = 12;
  config.topk = 5;
  config.hidden = 2080;
  config.dtype = DType::bf16;
  config.max_tokens = 200;
  config.capacity = 400;
  config.grouped_rows = 5000;
  config.slots = 3;
  for (const int in_place : {0, 1}) {
    const Scenario s = random_scenario(config, 2, {}, random);
    in_ranks(config, 2, [&](Rank& self) {
      Manner manner;
      manner.combine = self.rank == in_place ? RowsOf::lent_slot : RowsOf::tensor;
      for (int i = 0; i < 2; ++i) check_round_trip(self, s, s, manner);
    });
  }
}

void layouts_must_agree() {
  Random random(163);
  Config config = small_config(2);
  config.grouped_rows = 100;
  Scenario s{config, {}, {}};
  for (const bool grouped : {true, false}) {
    RankCase r;
    r.tokens = 1;
    r.topk_idx = {0, 3};
    r.grouped = grouped;
    s.ranks.push_back(std::move(r));
  }
  complete(s, random);
  in_ranks(config, 2, [&](Rank& self) {
    const auto error =
        check_throws<CommFailure>([&] { start_dispatch(self, s, {}); }, "ranks ask for different layouts");
    check(describe(error.failure).find("layout=\"expert\"") != std::string::npos, "the error says so");
  });
}

const Suite suite(
    {{"each_rank_chooses_for_itself", each_rank_chooses_for_itself},
     {"rows_past_capacity_are_dropped_from_their_groups", rows_past_capacity_are_dropped_from_their_groups},
     {"every_vector_path_rounds_the_sum_of_each_rank", every_vector_path_rounds_the_sum_of_each_rank},
     {"sums_of_both_kinds_follow_each_other", sums_of_both_kinds_follow_each_other},
     {"layouts_must_agree", layouts_must_agree}});

}  // namespace
}  // namespace commlib::testing
