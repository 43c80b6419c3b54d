// CUDA graphs: operations along a known routing, captured once and run again and again without the host.
#include <functional>

#include "cpp/oversubscribed.h"
#include "cpp/suite.h"
#include "simt/runtime/graph.h"

namespace commlib::testing {
namespace {

// A redispatch of some values and their combine, in one graph.
class Captured {
 public:
  Captured(Rank& self, const Dispatched& known, const Scenario& values, const Manner& manner)
      : self_(self), values_(values), graph_(self, [&] {
          rows_ = start_redispatch(self, known, values, manner);
          sums_ = start_combine(self, known, values, manner);
        }) {}

  void launch() const {
    forget_results();
    graph_.launch(self_);
  }
  void launch(cudaStream_t stream) const {
    forget_results();
    graph_.launch(stream);
  }
  void check_results() const {
    settle(*self_.comm);
    check_redispatch(*rows_);
    check_combine(self_, *sums_, values_);
  }

 private:
  void forget_results() const {
    forget(rows_->rows);
    forget(rows_->weights);
    forget(sums_->out);
    forget(sums_->out_weights);
  }

  Rank& self_;
  const Scenario& values_;
  DispatchedPtr rows_;
  CombinedPtr sums_;
  const Graph graph_;
};

Config with_slots(Config config, int slots) {
  config.slots = slots;
  return config;
}

// Two graphs with values of their own, in an order that all ranks share, and what the host launches between.
void graphs_and_other_operations_take_turns(const Config& config, uint64_t stream) {
  Random random(stream);
  Asked waves;
  waves.waves = config.net.node_of.empty();
  const int ranks = config.size;
  const Scenario first = random_scenario(config, ranks, {}, random);
  const Scenario second = with_other_values(first, random), third = with_other_values(first, random);
  const Scenario other = random_scenario(config, ranks, waves, random);
  in_ranks(config, ranks, [&](Rank& self) {
    const DispatchedPtr known = start_dispatch(self, first, {});
    check_dispatch(*known);
    const Captured one(self, *known, first, {}), two(self, *known, second, {});
    Random order(stream);
    for (int i = 0; i < rounds(160); ++i) {
      switch (order.below(4)) {
        case 0:
          one.launch();
          two.launch();
          one.check_results();
          two.check_results();
          break;
        case 1:
          two.launch();
          check_round_trip(self, other, other, {});
          two.check_results();
          break;
        case 2:
          check_redispatch(*start_redispatch(self, *known, third, {}));
          break;
        default:
          one.launch();
          check_combine(self, *start_combine(self, *known, third, {}), third);
          one.check_results();
      }
      self.nap_sometimes();
    }
  });
}

void a_graph_gives_the_right_results_as_often_as_it_runs() {
  Config config = with_slots(small_config(3), 6);
  config.num_sms = 2;
  graphs_and_other_operations_take_turns(config, 500);
  config.first_epoch = (uint64_t{1} << 32) - static_cast<uint64_t>(rounds(160));
  graphs_and_other_operations_take_turns(config, 501);
}

void a_graph_may_reach_other_nodes() {
  Config config = with_slots(small_config(4), 6);
  config.net.node_of = {0, 0, 1, 1};
  config.net.chunk_bytes = 600;
  config.net.chunks = 2;
  graphs_and_other_operations_take_turns(config, 502);
}

void a_graph_may_combine_rows_where_they_lie() {
  Random random(503);
  const Config config = with_slots(small_config(2), 6);
  Asked asked;
  asked.may_group = false;
  const Scenario s = random_scenario(config, 2, asked, random);
  in_ranks(config, 2, [&](Rank& self) {
    Manner manner;
    manner.zero_copy = true;
    manner.combine = RowsOf::receive_slot;
    const DispatchedPtr known = start_dispatch(self, s, manner);
    check_dispatch(*known);
    const Captured graph(self, *known, s, manner);
    for (int i = 0; i < rounds(64); ++i) {
      graph.launch();
      graph.check_results();
      check_round_trip(self, s, s, {});
    }
  });
}

// A routing that all ranks know, and a graph of its operations: what `body` is given.
void with_a_graph(
    const Config& config, const Scenario& s,
    const std::function<void(Rank& self, const Dispatched& known, const Captured& graph)>& body) {
  in_ranks(config, config.size, [&](Rank& self) {
    const DispatchedPtr known = start_dispatch(self, s, {});
    check_dispatch(*known);
    const Captured graph(self, *known, s, {});
    self.meet();
    body(self, *known, graph);
    self.meet();
  });
}

// The host numbers a dispatch whose rows overflow, and no kernel moves them.
void a_dispatch_that_overflows_between_runs_is_counted() {
  Random random(504);
  const Config config = with_slots(narrow_config(2), 4);
  const Scenario few = fitting(config, 2, random), many = oversubscribed(config, 2, false, random);
  with_a_graph(config, few, [&](Rank& self, const Dispatched&, const Captured& graph) {
    for (int i = 0; i < rounds(48); ++i) {
      graph.launch();
      refusal(self, many);
      graph.check_results();
      graph.launch();
      graph.check_results();
    }
  });
}

void a_rank_that_does_not_run_its_graph_is_named() {
  Random random(505);
  Config config = with_slots(small_config(2), 4);
  config.timeout = 0.3;
  const Scenario s = random_scenario(config, 2, {}, random);
  with_a_graph(config, s, [&](Rank& self, const Dispatched&, const Captured& graph) {
    graph.launch();
    graph.check_results();
    self.meet();
    if (self.rank == 1) return;
    graph.launch();
    const auto error = check_throws<CommFailure>([&] { self.comm->synchronize(); }, "a run without rank 1");
    check(error.failure.peers() == std::vector<int>{1}, "it is named");
    check_equal(static_cast<int>(error.failure.record.op), static_cast<int>(OpKind::redispatch),
                "the operation of the graph");
    graph.launch();  // and a graph whose communicator has failed ends at once
    cuda::check(cudaStreamSynchronize(stream_of(self)), "cudaStreamSynchronize");
  });
}

// A new deadline holds for graphs that were captured before, which have no argument for it.
void a_graph_keeps_to_the_deadline_of_now() {
  Random random(506);
  const Config config = with_slots(small_config(2), 4);
  const Scenario s = random_scenario(config, 2, {}, random);
  with_a_graph(config, s, [&](Rank& self, const Dispatched&, const Captured& graph) {
    if (self.rank == 1) return;
    self.comm->set_timeout(0.2);
    graph.launch();
    const auto error = check_throws<CommFailure>([&] { self.comm->synchronize(); }, "a run without rank 1");
    check(error.failure.record.waited_ns < 60'000'000'000u, "not the hour that there was");
  });
}

void a_graph_beside_another_operation_is_an_error_that_says_so() {
  Random random(507);
  Config config = with_slots(small_config(2), 4);
  config.timeout = 30;
  const Scenario s = random_scenario(config, 2, {}, random);
  with_a_graph(config, s, [&](Rank& self, const Dispatched& known, const Captured& graph) {
    if (self.rank == 1) return;
    cudaStream_t beside = nullptr;
    cuda::check(cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    const CombinedPtr waits = start_combine(self, known, s, {});  // for rank 1, which never comes
    graph.launch(beside);
    cuda::check(cudaStreamSynchronize(beside), "cudaStreamSynchronize");
    const auto error = check_throws<CommFailure>([&] { self.comm->synchronize(); }, "two at once");
    check_equal(static_cast<int>(error.failure.record.cause), static_cast<int>(Cause::overlap), "the cause");
    check_contains(error.what(), "beside another operation", "the text");
    cudaStreamDestroy(beside);
  });
}

void a_graph_may_outlive_its_communicator_and_then_does_nothing() {
  Random random(508);
  const Config config = with_slots(small_config(2), 4);
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    const cudaStream_t stream = stream_of(self);
    const DispatchedPtr known = start_dispatch(self, s, {});
    check_dispatch(*known);
    const Buffer sums(s.ranks[self.rank].out.bytes());
    CombineInput input;
    const RankCase& mine = s.ranks[self.rank];
    input.y = mine.y.data();
    input.stride = s.row_bytes();
    const Graph graph(self, [&] { self.comm->combine(input, known->routing, sums.data(), nullptr, false); });
    graph.launch(stream);
    settle(*self.comm);
    self.meet();
    self.comm->close();
    self.meet();
    self.comm.reset();
    self.meet();
    forget(sums);
    graph.launch(stream);
    cuda::check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    const Buffer untouched(sums.bytes());
    forget(untouched);
    check_bytes(sums.data(), untouched, "nothing was written");
    self.meet();
  });
}

void a_graph_has_its_slots_until_it_is_gone() {
  Random random(509);
  const Config config = with_slots(small_config(2), 2);
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    const DispatchedPtr known = start_dispatch(self, s, {});
    check_dispatch(*known);
    {
      const Captured graph(self, *known, s, {});
      check_equal(self.comm->slots_in_use(), 1, "slots: its operations take one in turns");
      {
        const std::shared_ptr<SlotLease> other = lend_slot(self);
        const auto refused = check_throws<SlotError>([&] { Captured(self, *known, s, {}); },
                                                     "a second graph with no slot left");
        check_contains(refused.what(), "CUDA graphs", "the text");
      }
      graph.launch();
      check_round_trip(self, s, s, {});
      graph.check_results();
      self.meet();
    }
    const std::shared_ptr<SlotLease> a = lend_slot(self), b = lend_slot(self);
    check_equal(self.comm->slots_in_use(), 2, "slots, none of which is the graph's any more");
  });
}

void a_dispatch_that_asks_the_host_cannot_be_captured() {
  Random random(510);
  const Config config = with_slots(small_config(2), 4);
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    const auto refused = check_throws<std::runtime_error>(
        [&] { Graph(self, [&] { start_dispatch(self, s, {}); }); }, "a captured dispatch without a handle");
    check_contains(refused.what(), "cannot be captured", "the text");
    check_round_trip(self, s, s, {});
  });
}

const Suite suite(
    {{"a_graph_gives_the_right_results_as_often_as_it_runs",
      a_graph_gives_the_right_results_as_often_as_it_runs},
     {"a_graph_may_reach_other_nodes", a_graph_may_reach_other_nodes},
     {"a_graph_may_combine_rows_where_they_lie", a_graph_may_combine_rows_where_they_lie},
     {"a_dispatch_that_overflows_between_runs_is_counted", a_dispatch_that_overflows_between_runs_is_counted},
     {"a_rank_that_does_not_run_its_graph_is_named", a_rank_that_does_not_run_its_graph_is_named},
     {"a_graph_keeps_to_the_deadline_of_now", a_graph_keeps_to_the_deadline_of_now},
     {"a_graph_beside_another_operation_is_an_error_that_says_so",
      a_graph_beside_another_operation_is_an_error_that_says_so},
     {"a_graph_may_outlive_its_communicator_and_then_does_nothing",
      a_graph_may_outlive_its_communicator_and_then_does_nothing},
     {"a_graph_has_its_slots_until_it_is_gone", a_graph_has_its_slots_until_it_is_gone},
     {"a_dispatch_that_asks_the_host_cannot_be_captured", a_dispatch_that_asks_the_host_cannot_be_captured}});

}  // namespace
}  // namespace commlib::testing
