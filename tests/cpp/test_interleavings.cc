// Many operations back to back: synchronous and asynchronous mixed, two batches in flight, epochs that wrap
// around. ThreadSanitizer looks at the order, the checks at the result.
#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

// In each round a dispatch, a redispatch of the previous batch and its combine, in flight together. How each
// rank asks, how long it sleeps and in which order it waits differ by rank.
void run_pipeline(Rank& self, const std::vector<Scenario>& batches, const std::vector<Scenario>& others) {
  DispatchedPtr last;
  for (size_t i = 0; i <= batches.size(); ++i) {
    DispatchedPtr now, again;
    CombinedPtr back;
    if (i < batches.size()) {
      now = start_dispatch(self, batches[i], random_manner(self.random));
      self.nap_sometimes();
    }
    if (last) {
      if (i % 3 == 0) {
        Manner owned = random_manner(self.random);
        owned.zero_copy = false;
        again = start_redispatch(self, *last, others[i - 1], owned);
        self.nap_sometimes();
      }
      back = start_combine(self, *last, batches[i - 1], random_manner(self.random));
      self.nap_sometimes();
    }
    const bool combine_first = self.random.one_in(2);
    if (back && combine_first) check_combine(self, *back, batches[i - 1]);
    if (now) check_dispatch(*now);
    if (again) check_redispatch(*again);
    if (back && !combine_first) check_combine(self, *back, batches[i - 1]);
    last = std::move(now);
  }
}

constexpr int kRounds = 130;  // three operations in each at most: epochs of all kinds wrap around
constexpr int kRepeats = 16;

void many_operations_once(Config config, int ranks, Random& random) {
  config.hidden = 24;
  config.max_tokens = 6;
  config.capacity = ranks * config.max_tokens;
  config.slots = 4;  // two receive slots kept, one lent, one at work
  config.grouped_rows = random_room(random);
  std::vector<Scenario> batches, others;
  for (int i = 0; i < rounds(kRounds); ++i) {
    Asked asked;
    asked.weights = random.one_in(2);
    asked.weight_grads = random.one_in(2);
    asked.waves = config.net.node_of.empty() && random.one_in(3);
    batches.push_back(random_scenario(config, ranks, asked, random));
    others.push_back(with_other_values(batches.back(), random));
  }
  std::vector<Config> configs(ranks, config);
  for (int p = 0; p < ranks; ++p) configs[p].num_sms = 1 + static_cast<int>(random.below(3));
  in_ranks(configs, [&](Rank& self) { run_pipeline(self, batches, others); });
}

void many_operations(const Config& config, int ranks, uint64_t stream) {
  Random random(stream);
  for (int i = 0; i < rounds(kRepeats); ++i) many_operations_once(config, ranks, random);
}

constexpr uint64_t kTags = uint64_t{1} << 32;  // tagged words carry the lower half of an epoch

// Before tags wrap around; where all rounds are taken, far enough that every word has been written before
// that, as in a long run.
uint64_t near_the_end() { return kTags - static_cast<uint64_t>(rounds(80)); }

// Each word and each row passes through code that ThreadSanitizer sees.
void four_ranks_with_tags_that_wrap_around() {
  Config config = small_config(4);
  config.vector_ops = "plain";
  config.first_epoch = near_the_end();
  many_operations(config, 4, 100);
}

void three_ranks_that_sleep_at_once() {
  Config config = small_config(3);
  config.spin = {0, 0};
  config.first_epoch = near_the_end();
  many_operations(config, 3, 101);
}

void two_ranks_that_spin() {
  Config config = small_config(2);
  config.topk = 4;
  config.dtype = DType::bf16;
  many_operations(config, 2, 102);
}

void one_rank_by_itself() {
  Config config = small_config(1);
  config.vector_ops = "plain";
  many_operations(config, 1, 103);
}

void four_ranks_on_two_nodes() {
  Config config = small_config(4);
  config.vector_ops = "plain";
  config.net.node_of = {0, 0, 1, 1};
  config.net.chunk_bytes = 500;
  config.net.chunks = 2;
  config.first_epoch = near_the_end();
  Random random(106);
  for (int i = 0; i < rounds(4); ++i) {
    config.net.hierarchical = i % 2 == 0;
    many_operations_once(config, 4, random);
  }
}

// With two slots, each operation waits for one before it; all results are owned.
void two_slots_are_enough_for_owned_results() {
  Random random(104);
  Config config = small_config(3);
  config.slots = 2;
  config.num_sms = 2;
  std::vector<Scenario> batches;
  for (int i = 0; i < rounds(40); ++i) batches.push_back(random_scenario(config, 3, {}, random));
  in_ranks(config, 3, [&](Rank& self) {
    for (const Scenario& s : batches) {
      Manner manner;
      manner.async = self.random.one_in(2);
      const DispatchedPtr d = start_dispatch(self, s, manner);
      self.nap_sometimes();
      const DispatchedPtr again = start_redispatch(self, *d, s, manner);
      check_dispatch(*d);
      const CombinedPtr back = start_combine(self, *d, s, manner);
      check_redispatch(*again);
      self.nap_sometimes();
      check_combine(self, *back, s);
    }
  });
}

// Words not written yet must not be taken for those of the first operation after the wrap-around.
void a_communicator_may_start_just_before_the_wrap_around() {
  Random random(105);
  for (const uint64_t first : {kTags - 1, kTags - 2, kTags}) {
    Config config = small_config(3);
    config.first_epoch = first;
    config.slots = 3;
    config.timeout = 20;
    std::vector<Scenario> batches;
    for (int i = 0; i < 6; ++i) batches.push_back(random_scenario(config, 3, {}, random));
    in_ranks(config, 3, [&](Rank& self) {
      for (const Scenario& s : batches) {
        self.nap_sometimes();
        check_round_trip(self, s, s, {});
      }
    });
  }
}

const Suite suite({{"four_ranks_with_tags_that_wrap_around", four_ranks_with_tags_that_wrap_around},
                   {"three_ranks_that_sleep_at_once", three_ranks_that_sleep_at_once},
                   {"two_ranks_that_spin", two_ranks_that_spin},
                   {"one_rank_by_itself", one_rank_by_itself},
                   {"four_ranks_on_two_nodes", four_ranks_on_two_nodes},
                   {"two_slots_are_enough_for_owned_results", two_slots_are_enough_for_owned_results},
                   {"a_communicator_may_start_just_before_the_wrap_around",
                    a_communicator_may_start_just_before_the_wrap_around}});

}  // namespace
}  // namespace commlib::testing
