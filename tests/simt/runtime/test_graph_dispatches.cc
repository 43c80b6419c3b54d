// Bounded dispatches in CUDA graphs: each run finds the routing of its ids.
#include <algorithm>

#include "cpp/oversubscribed.h"
#include "cpp/suite.h"
#include "simt/runtime/graph.h"

namespace commlib::testing {
namespace {

// As many grouped rows as may come, wherever they come from.
int64_t most_rows(const Scenario& s) {
  int64_t pairs = 0;
  for (const RankCase& r : s.ranks) pairs += r.tokens * s.config.topk;
  int64_t align = 1;
  for (const RankCase& r : s.ranks) align = std::max(align, r.align);
  return pairs + s.config.experts * (align - 1);
}

bool same_inputs(const Scenario& a, const Scenario& b) {
  for (size_t p = 0; p < a.ranks.size(); ++p) {
    if (a.ranks[p].weighted != b.ranks[p].weighted || a.ranks[p].biased != b.ranks[p].biased) return false;
  }
  return true;
}

// Other ids and other values, for the same operations: as many tokens, the same layouts, and what goes along.
Scenario with_other_ids(const Scenario& s, Random& random) {
  for (;;) {
    Scenario other{s.config, s.asked, {}};
    for (const RankCase& r : s.ranks) {
      RankCase& o = other.ranks.emplace_back();
      o.tokens = r.tokens;
      o.grouped = r.grouped;
      o.align = r.align;
      o.topk_idx = random_routing(s.config, r.tokens, random);
    }
    complete(other, random);
    if (same_inputs(s, other)) return other;
  }
}

// Room for whatever a rank may send and get.
Scenario with_room(const Scenario& s) {
  Scenario room{s.config, s.asked, {}};
  const int64_t topk = s.config.topk;
  for (const RankCase& r : s.ranks) {
    const int64_t most = r.grouped ? most_rows(s) : s.config.capacity;
    RankCase& to = room.ranks.emplace_back();
    to.tokens = r.tokens;
    to.grouped = r.grouped;
    to.align = r.align;
    to.weighted = r.weighted;
    to.biased = r.biased;
    to.topk_idx.resize(r.topk_idx.size());
    to.x_stride = s.row_bytes();
    to.x = Buffer(r.tokens * to.x_stride);
    to.weights = Buffer(r.tokens * topk * s.weight_bytes());
    to.results = most;
    (r.grouped ? to.expand_to : to.ids).resize(s.config.capacity * topk);
    to.source.resize(2 * most);
    to.y = Buffer(most * s.row_bytes());
    to.y_weights = Buffer(most * s.weight_bytes());
    to.weight_grads = Buffer(most * (r.grouped ? 1 : topk) * s.weight_bytes());
    to.bias = Buffer(r.tokens * s.row_bytes());
    to.out = Buffer(r.out.bytes());
    to.out_weights = Buffer(r.out_weights.bytes());
  }
  return room;
}

void copy(const Buffer& to, const Buffer& from) {
  copy_bytes(to.data(), from.data(), static_cast<size_t>(std::min(to.bytes(), from.bytes())));
}

// The first bytes of it.
void trim(Buffer& to, const Buffer& from, int64_t bytes) {
  to = Buffer(bytes);
  copy(to, from);
}

template <class T>
void trim(T& to, const T& from, size_t size) {
  to.assign(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(size));
}

// A dispatch and its combine. The results of a combine are those of rows that it is given.
class CapturedDispatch {
 public:
  CapturedDispatch(Rank& self, Scenario& room, const Manner& manner)
      : self_(self), mine_(room.ranks[self.rank]), graph_(self, [&] {
          rows_ = start_dispatch(self, room, manner);
          sums_ = start_combine(self, *rows_, room, manner);
        }) {}

  void launch(const Scenario& s) const {
    settle(*self_.comm);
    put_in(s);
    launch();
  }
  void launch() const {
    forget(sums_->out);
    graph_.launch(self_);
  }
  void put_in(const Scenario& s) const {
    const RankCase& r = s.ranks[self_.rank];
    std::copy(r.topk_idx.begin(), r.topk_idx.end(), mine_.topk_idx.begin());
    for (int64_t t = 0; t < r.tokens; ++t) {
      copy_bytes(mine_.x.data() + t * mine_.x_stride, r.x.data() + t * r.x_stride,
                 static_cast<size_t>(s.row_bytes()));
    }
    copy(mine_.weights, r.weights);
    copy(mine_.y, r.y);
    copy(mine_.y_weights, r.y_weights);
    copy(mine_.weight_grads, r.weight_grads);
    copy(mine_.bias, r.bias);
  }
  void put_in_id(size_t at, int64_t id) const { mine_.topk_idx[at] = id; }

  void check_results(const Scenario& s) const {
    settle(*self_.comm);
    const RankCase& r = s.ranks[self_.rank];
    Dispatched d;
    d.scenario = &s;
    d.rank = self_.rank;
    d.rows = Buffer(r.received.bytes());
    copy_bytes(d.rows.data(), rows_->data(), static_cast<size_t>(d.rows.bytes()));
    if (s.asked.weights) trim(d.weights, rows_->weights, r.received_weights.bytes());
    trim(d.source, rows_->source, r.source.size());
    trim(d.ids, rows_->ids, r.grouped ? 0 : r.ids.size());
    trim(d.expand_to, rows_->expand_to, r.expand_to.size());
    d.room.rows_per_expert = rows_->room.rows_per_expert;
    d.room.offsets = rows_->room.offsets;
    d.totals = rows_->totals;
    d.dropped = r.dropped;
    check_dispatch(d);
    check_combine(self_, *sums_, s);
  }

 private:
  Rank& self_;
  RankCase& mine_;
  DispatchedPtr rows_;
  CombinedPtr sums_;
  const Graph graph_;
};

// Graphs, dispatches that the host waits for, and bounded ones, in an order that all ranks share.
void each_run_finds_its_routing(Config config, int runs, uint64_t stream) {
  Random random(stream);
  config.slots = 8;
  Asked asked;
  asked.bounded = true;
  asked.weight_grads = random.one_in(2);
  std::vector<Scenario> s;
  s.push_back(random_scenario(config, config.size, asked, random));
  while (s.size() < 5) s.push_back(with_other_ids(s[0], random));
  Scenario exact = with_other_values(s[0], random);
  exact.asked.bounded = false;
  in_ranks(config, config.size, [&](Rank& self) {
    Scenario room = with_room(s[0]), other_room = with_room(s[0]);
    Manner zero_copy;
    zero_copy.zero_copy = true;
    const CapturedDispatch one(self, room, {}), two(self, other_room, zero_copy);
    Random order(stream + 1);
    for (int i = 0; i < runs; ++i) {
      const Scenario &now = s[order.below(s.size())], &next = s[order.below(s.size())];
      switch (order.below(4)) {
        case 0:
          one.launch(now);
          two.launch(next);
          one.check_results(now);
          two.check_results(next);
          break;
        case 1:
          one.launch(now);
          check_round_trip(self, exact, exact, {});
          one.check_results(now);
          break;
        case 2: {
          const DispatchedPtr d = start_dispatch(self, next, {});
          two.launch(now);
          two.check_results(now);
          check_dispatch(*d);
          break;
        }
        default:
          one.launch(now);
          one.check_results(now);
      }
      self.nap_sometimes();
    }
  });
}

void a_graph_with_a_dispatch_finds_the_routing_of_each_run() {
  Config config = small_config(3);
  config.num_sms = 2;
  each_run_finds_its_routing(config, rounds(120), 520);
  config.first_epoch = (uint64_t{1} << 32) - static_cast<uint64_t>(rounds(120));
  each_run_finds_its_routing(config, rounds(120), 521);
}

void such_a_graph_may_send_rows_straight_to_their_groups() {
  Config config = small_config(2);
  config.grouped_rows = 400;
  for (uint64_t stream = 530; stream < 533; ++stream) each_run_finds_its_routing(config, rounds(40), stream);
}

void such_a_graph_may_reach_other_nodes() {
  Config config = small_config(4);
  config.net.node_of = {0, 0, 1, 1};
  config.net.chunk_bytes = 600;
  config.net.chunks = 2;
  each_run_finds_its_routing(config, rounds(60), 540);
}

// What is wrong in one run is told once, by a later call, and the next run is sound.
void a_bad_id_in_a_run_is_told_by_the_next_call() {
  Random random(550);
  Config config = small_config(2);
  config.slots = 4;
  Asked asked;
  asked.bounded = true;
  Scenario s = random_scenario(config, 2, asked, random);
  while (s.ranks[1].tokens == 0) s = random_scenario(config, 2, asked, random);
  in_ranks(config, 2, [&](Rank& self) {
    Scenario room = with_room(s);
    const CapturedDispatch graph(self, room, {});
    graph.launch(s);
    graph.check_results(s);
    if (self.rank == 1) graph.put_in_id(0, 1'000'000);
    graph.launch();
    if (self.rank == 1) {
      const auto error =
          check_throws<std::invalid_argument>([&] { self.comm->synchronize(); }, "a bad id in a graph");
      check_contains(error.what(), "topk_idx[0, 0] is 1000000", "the text");
    }
    graph.launch(s);
    graph.check_results(s);
  });
}

const Suite suite({{"a_graph_with_a_dispatch_finds_the_routing_of_each_run",
                    a_graph_with_a_dispatch_finds_the_routing_of_each_run},
                   {"such_a_graph_may_send_rows_straight_to_their_groups",
                    such_a_graph_may_send_rows_straight_to_their_groups},
                   {"such_a_graph_may_reach_other_nodes", such_a_graph_may_reach_other_nodes},
                   {"a_bad_id_in_a_run_is_told_by_the_next_call",
                    a_bad_id_in_a_run_is_told_by_the_next_call}});

}  // namespace
}  // namespace commlib::testing
