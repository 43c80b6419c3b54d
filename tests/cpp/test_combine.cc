// What comes back: sums, in the documented order, bit by bit.
#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

void combine_once(const Config& config, int ranks, const Asked& asked, const Manner& manner, Random& random) {
  const Scenario s = random_scenario(config, ranks, asked, random);
  in_ranks(config, ranks, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, manner);
    check_dispatch(*d);
    check_combine(self, *start_combine(self, *d, s, manner), s);
  });
}

// Layouts, expert weights and bias differ by rank at random; weight gradients ride along.
void sums_are_taken_in_order_of_rank_with_one_rounding() {
  Random random(20);
  for (int ranks = 1; ranks <= 4; ++ranks) {
    for (int workers = 1; workers <= 3; ++workers) {
      Config config = small_config(ranks);
      config.num_sms = workers;
      config.topk = 1 + static_cast<int>(random.below(4));
      combine_once(config, ranks, {}, {}, random);
    }
  }
}

void every_vector_path_sums_every_dtype_to_the_same_bits() {
  Random random(21);
  for (const std::string& name : vector_paths()) {
    for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
      for (const int64_t hidden : {1, 31, 96, 160, 2080}) {
        Config config = small_config(2);
        config.vector_ops = name;
        config.dtype = static_cast<DType>(dtype);
        config.hidden = hidden;
        config.topk = 3;
        combine_once(config, 2, {}, {}, random);
      }
    }
  }
}

void weight_gradients_need_not_ride_back() {
  Random random(22);
  Asked asked;
  asked.weight_grads = false;
  for (int ranks = 1; ranks <= 3; ++ranks) combine_once(small_config(ranks), ranks, asked, {}, random);
}

void rows_in_place(RowsOf where, uint64_t stream) {
  Random random(stream);
  for (int round = 0; round < 8; ++round) {
    const int ranks = 1 + round % 4;
    Config config = small_config(ranks);
    config.num_sms = 1 + round % 3;
    config.slots = 3;
    Asked asked;
    asked.may_group = false;
    Manner manner;
    manner.zero_copy = true;
    manner.combine = where;
    combine_once(config, ranks, asked, manner, random);
  }
}

void rows_written_into_a_lent_slot_are_pulled_from_there() { rows_in_place(RowsOf::lent_slot, 23); }
void rows_left_in_the_receive_slot_are_pulled_from_there() { rows_in_place(RowsOf::receive_slot, 24); }

void one_routing_serves_many_combines() {
  Random random(25);
  Config config = small_config(3);
  config.num_sms = 2;
  const Scenario first = random_scenario(config, 3, {}, random);
  std::vector<Scenario> others;
  for (int i = 0; i < 6; ++i) others.push_back(with_other_values(first, random));
  in_ranks(config, 3, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, first, {});
    check_dispatch(*d);
    for (const Scenario& values : others) {
      self.nap_sometimes();
      check_combine(self, *start_combine(self, *d, values, {}), values);
    }
  });
}

// A rank without tokens has nothing to pull, so its second combine starts while others still pull from the
// first.
void a_receive_slot_may_serve_two_combines_with_weight_gradients() {
  Random random(26);
  Config config = small_config(2);
  config.hidden = 4096;
  config.max_tokens = 32;
  config.capacity = 64;
  config.vector_ops = "plain";
  Scenario first{config, {}, {}};
  for (const int64_t tokens : {0, 32}) {
    RankCase r;
    r.tokens = tokens;
    for (int64_t t = 0; t < tokens; ++t)
      r.topk_idx.insert(r.topk_idx.end(), {0, 2});  // one expert of each rank
    first.ranks.push_back(std::move(r));
  }
  complete(first, random);
  const Scenario second = with_other_values(first, random);
  in_ranks(config, 2, [&](Rank& self) {
    Manner manner;
    manner.zero_copy = true;
    const DispatchedPtr d = start_dispatch(self, first, manner);
    check_dispatch(*d);
    const RankCase& a = first.ranks[self.rank];
    const RankCase& b = second.ranks[self.rank];
    CombineInput input;
    input.y = d->data();  // as received: the rows are not checked here
    input.stride = first.row_bytes();
    input.has_weight_grads = true;
    Buffer out(a.out.bytes()), grads_a(a.out_weights.bytes()), grads_b(b.out_weights.bytes());
    input.weight_grads = a.weight_grads.data();
    const UnderWay one(self, self.comm->combine(input, d->routing, out.data(), grads_a.data(), false));
    input.weight_grads = b.weight_grads.data();
    const UnderWay two(self, self.comm->combine(input, d->routing, out.data(), grads_b.data(), false));
    one.wait();
    two.wait();
    check_bytes(grads_a.data(), a.out_weights, "weight gradients of the first combine are right");
    check_bytes(grads_b.data(), b.out_weights, "weight gradients of the second combine are right");
  });
}

// Each rank writes its one slot again as soon as it may, while others are slower.
void a_slot_is_lent_again_when_all_have_pulled_from_it() {
  Random random(27);
  Config config = small_config(3);
  config.hidden = 512;
  config.slots = 1;
  Asked asked;
  asked.may_group = false;
  asked.weight_grads = false;
  const Scenario first = random_scenario(config, 3, asked, random);
  std::vector<Scenario> others;
  for (int i = 0; i < 8; ++i) others.push_back(with_other_values(first, random));
  in_ranks(config, 3, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, first, {});
    check_dispatch(*d);
    Manner manner;
    manner.combine = RowsOf::lent_slot;
    for (const Scenario& values : others) {
      check_combine(self, *start_combine(self, *d, values, manner), values);
      self.nap_sometimes();
    }
  });
}

const Suite suite({{"sums_are_taken_in_order_of_rank_with_one_rounding",
                    sums_are_taken_in_order_of_rank_with_one_rounding},
                   {"every_vector_path_sums_every_dtype_to_the_same_bits",
                    every_vector_path_sums_every_dtype_to_the_same_bits},
                   {"weight_gradients_need_not_ride_back", weight_gradients_need_not_ride_back},
                   {"rows_written_into_a_lent_slot_are_pulled_from_there",
                    rows_written_into_a_lent_slot_are_pulled_from_there},
                   {"rows_left_in_the_receive_slot_are_pulled_from_there",
                    rows_left_in_the_receive_slot_are_pulled_from_there},
                   {"one_routing_serves_many_combines", one_routing_serves_many_combines},
                   {"a_receive_slot_may_serve_two_combines_with_weight_gradients",
                    a_receive_slot_may_serve_two_combines_with_weight_gradients},
                   {"a_slot_is_lent_again_when_all_have_pulled_from_it",
                    a_slot_is_lent_again_when_all_have_pulled_from_it}});

}  // namespace
}  // namespace commlib::testing
