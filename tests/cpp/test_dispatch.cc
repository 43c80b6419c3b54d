// Where rows go: dispatch in both layouts, and along a known routing.
#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

// One dispatch of a scenario on every rank. Odd ranks leave rows in their slots where they can.
void dispatch_once(const std::vector<Config>& configs, const Scenario& s) {
  in_ranks(configs, [&](Rank& self) {
    Manner manner;
    manner.zero_copy = self.rank % 2 == 1;
    check_dispatch(*start_dispatch(self, s, manner));
  });
}

void dispatch_random(const Config& config, int ranks, const Asked& asked, Random& random) {
  dispatch_once(std::vector<Config>(ranks, config), random_scenario(config, ranks, asked, random));
}

Asked rank_layout() {
  Asked asked;
  asked.may_group = false;
  return asked;
}

void rows_arrive_in_source_then_token_order() {
  Random random(1);
  for (int ranks = 1; ranks <= 4; ++ranks) {
    for (int workers = 1; workers <= 3; ++workers) {
      Config config = small_config(ranks);
      config.num_sms = workers;
      config.topk = 1 + static_cast<int>(random.below(4));
      dispatch_random(config, ranks, rank_layout(), random);
    }
  }
}

void every_vector_path_moves_every_dtype_and_row_size() {
  Random random(2);
  for (const std::string& name : vector_paths()) {
    for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
      for (const int64_t hidden : {1, 31, 64, 160, 2080}) {  // whole cache lines or not
        Config config = small_config(2);
        config.vector_ops = name;
        config.dtype = static_cast<DType>(dtype);
        config.hidden = hidden;
        dispatch_random(config, 2, {}, random);
      }
    }
  }
}

void rows_of_eight_ranks_arrive_in_order() {
  Random random(3);
  Config config = small_config(8);
  config.topk = 6;
  dispatch_random(config, 8, {}, random);
}

void ranks_may_have_different_numbers_of_workers() {
  Random random(4);
  for (int round = 0; round < 3; ++round) {
    std::vector<Config> configs(3, small_config(3));
    for (int p = 0; p < 3; ++p) configs[p].num_sms = 1 + (p + round) % 3;
    dispatch_once(configs, random_scenario(configs[0], 3, {}, random));
  }
}

void weights_may_stay_at_home() {
  Random random(5);
  Asked asked;
  asked.weights = false;
  for (int ranks = 1; ranks <= 3; ++ranks) dispatch_random(small_config(ranks), ranks, asked, random);
}

void experts_need_not_be_a_multiple_of_ranks() {
  Random random(6);
  for (const int64_t experts : {1, 2, 4, 7}) {  // three ranks: some have none, or one more than others
    Config config = small_config(3);
    config.experts = experts;
    dispatch_random(config, 3, {}, random);
  }
}

// A scenario with a routing of the test's own.
Scenario routed(const Config& config, const std::vector<int64_t>& tokens,
                const std::vector<int64_t>& ids_of_tokens, bool grouped, Random& random) {
  Scenario s{config, {}, {}};
  for (const int64_t t : tokens) {
    RankCase r;
    r.tokens = t;
    for (int64_t i = 0; i < t; ++i)
      r.topk_idx.insert(r.topk_idx.end(), ids_of_tokens.begin(), ids_of_tokens.end());
    r.grouped = grouped;
    r.align = grouped ? 4 : 1;
    s.ranks.push_back(std::move(r));
  }
  complete(s, random);
  return s;
}

void all_tokens_may_go_to_one_expert() {
  Random random(7);
  const Config config = small_config(3);
  for (const bool grouped : {false, true}) {
    dispatch_once(std::vector<Config>(3, config), routed(config, {12, 5, 12}, {-1, 3}, grouped, random));
  }
}

void ranks_without_tokens_and_tokens_without_experts_send_nothing() {
  Random random(8);
  Config config = small_config(3);
  config.hidden = 31;
  for (const bool grouped : {false, true}) {
    dispatch_once(std::vector<Config>(3, config), routed(config, {0, 3, 0}, {0, 5}, grouped, random));
    dispatch_once(std::vector<Config>(3, config), routed(config, {4, 4, 0}, {-1, -1}, grouped, random));
    dispatch_once(std::vector<Config>(3, config), routed(config, {0, 0, 0}, {0, 1}, grouped, random));
  }
}

// The last row of x ends where its memory ends.
void a_token_without_experts_is_not_read() {
  Random random(11);
  for (const std::string& name : vector_paths()) {
    Config config = small_config(1);
    config.vector_ops = name;
    config.hidden = 3;
    dispatch_once({config}, routed(config, {2}, {-1, -1}, false, random));
  }
}

void groups_have_offsets_places_and_zero_padding() {
  Random random(9);
  for (int round = 0; round < 6; ++round) {
    Config config = small_config(2);
    config.experts = 6;
    config.topk = 4;
    config.num_sms = 1 + round % 3;
    Scenario s = random_scenario(config, 2, rank_layout(), random);
    Scenario grouped{config, {}, {}};
    for (const RankCase& r : s.ranks) {
      RankCase g;
      g.tokens = r.tokens;
      g.topk_idx = r.topk_idx;
      g.grouped = true;
      g.align = int64_t{1} << round;
      grouped.ranks.push_back(std::move(g));
    }
    complete(grouped, random);
    dispatch_once({config, config}, grouped);
  }
}

void redispatch_equals_dispatch_along_the_same_routing() {
  Random random(10);
  for (int round = 0; round < 6; ++round) {
    const int ranks = 1 + round % 4;
    Config config = small_config(ranks);
    config.num_sms = 1 + round % 3;
    config.slots = 3;
    const Scenario first = random_scenario(config, ranks, {}, random);
    const Scenario second = with_other_values(first, random);
    in_ranks(config, ranks, [&](Rank& self) {
      const DispatchedPtr known = start_dispatch(self, first, {});
      check_dispatch(*known);
      for (const bool zero_copy : {false, true}) {
        Manner manner;
        manner.zero_copy = zero_copy;
        check_redispatch(*start_redispatch(self, *known, second, manner));
      }
    });
  }
}

// More tokens than fit into one turn of any worker's lanes.
void many_tokens_take_many_turns() {
  Random random(12);
  Config config = small_config(2);
  config.experts = 5;
  config.topk = 2;
  config.hidden = 8;
  config.max_tokens = 560;
  config.capacity = 2 * config.max_tokens;
  Scenario s{config, {}, {}};
  for (const bool grouped : {true, false}) {
    RankCase r;
    r.tokens = config.max_tokens - random.below(10);
    for (int64_t t = 0; t < r.tokens; ++t) {
      const int64_t first = random.below(config.experts);
      for (int k = 0; k < config.topk; ++k) {
        r.topk_idx.push_back(random.one_in(4) ? -1 : (first + k) % config.experts);
      }
    }
    r.grouped = grouped;
    r.align = grouped ? 8 : 1;
    s.ranks.push_back(std::move(r));
  }
  complete(s, random);
  in_ranks(config, 2, [&](Rank& self) { check_round_trip(self, s, s, {}); });
}

const Suite suite(
    {{"rows_arrive_in_source_then_token_order", rows_arrive_in_source_then_token_order},
     {"every_vector_path_moves_every_dtype_and_row_size", every_vector_path_moves_every_dtype_and_row_size},
     {"rows_of_eight_ranks_arrive_in_order", rows_of_eight_ranks_arrive_in_order},
     {"ranks_may_have_different_numbers_of_workers", ranks_may_have_different_numbers_of_workers},
     {"weights_may_stay_at_home", weights_may_stay_at_home},
     {"experts_need_not_be_a_multiple_of_ranks", experts_need_not_be_a_multiple_of_ranks},
     {"all_tokens_may_go_to_one_expert", all_tokens_may_go_to_one_expert},
     {"ranks_without_tokens_and_tokens_without_experts_send_nothing",
      ranks_without_tokens_and_tokens_without_experts_send_nothing},
     {"a_token_without_experts_is_not_read", a_token_without_experts_is_not_read},
     {"groups_have_offsets_places_and_zero_padding", groups_have_offsets_places_and_zero_padding},
     {"redispatch_equals_dispatch_along_the_same_routing", redispatch_equals_dispatch_along_the_same_routing},
     {"many_tokens_take_many_turns", many_tokens_take_many_turns}});

}  // namespace
}  // namespace commlib::testing
