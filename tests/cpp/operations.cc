#include "operations.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace commlib::testing {
namespace {

RowFormat format_of(const Scenario& s, const Manner& manner, int64_t scale_bytes) {
  if (!manner.says_format) return {};
  const int type = 1 + static_cast<int>(s.config.dtype) + (scale_bytes ? 256 : 0);
  return {static_cast<uint16_t>(type), s.row_bytes(), scale_bytes};
}

std::byte scale_of(int64_t rank, int64_t token, int64_t i) {
  return static_cast<std::byte>(37 * rank + 11 * token + 5 * i + 1);
}

Rows rows_of(Dispatched& d, const Manner& manner) {
  const Scenario& s = *d.scenario;
  const RankCase& r = d.mine();
  d.scale_bytes = manner.scale_bytes;
  d.sent_scales = Buffer(r.tokens * manner.scale_bytes);
  for (int64_t i = 0; i < d.sent_scales.bytes(); ++i) {
    d.sent_scales.data()[i] = scale_of(d.rank, i / manner.scale_bytes, i % manner.scale_bytes);
  }
  return {r.x.data(),
          r.x_stride,
          r.tokens,
          s.asked.weights,
          s.asked.weights ? r.weights.data() : nullptr,
          d.sent_scales.data(),
          manner.scale_bytes,
          format_of(s, manner, manner.scale_bytes)};
}

// Room for results, aligned to a cache line or not: both ways of storing are taken.
Buffer room(Rank& self, int64_t bytes) { return Buffer(bytes, self.random.one_in(2) ? 0 : 8); }

bool may_lie_grouped(const Rank& self, const RankCase& r) {
  const int64_t room = self.comm->layout().grouped_rows;
  return room > 0 && r.results <= room;
}

Received room_for(Rank& self, Dispatched& d, const Manner& manner, bool in_slot) {
  const Scenario& s = *d.scenario;
  const RankCase& r = d.mine();
  Received received;
  received.count = r.results;
  if (!in_slot) {
    d.rows = room(self, r.results * s.row_bytes());
    received.rows = d.rows.data();
    d.scales = room(self, r.results * manner.scale_bytes);
    received.scales = d.scales.data();
  } else {
    received.rows_in_slot = true;
  }
  if (s.asked.weights) {
    d.weights = Buffer(r.results * s.weight_bytes() * (r.grouped ? 1 : s.config.topk));
    received.weights = d.weights.data();
  }
  return received;
}

}  // namespace

UnderWay::~UnderWay() {
  try {
    wait();
  } catch (...) {  // the test fails, or has asked for it
  }
}

// A communicator that is gone has finished its operations first.
void UnderWay::wait() const {
  const std::shared_ptr<Communicator> comm = std::exchange(comm_, {}).lock();
  if (comm) comm->wait(ticket_);
}

std::shared_ptr<SlotLease> lend_slot(Rank& self) {
  std::shared_ptr<SlotLease> lease = self.comm->lend_slot();
  settle(*self.comm);
  return lease;
}

Manner random_manner(Random& random) {
  return {random.one_in(2), random.one_in(2), static_cast<RowsOf>(random.below(3)), nullptr, nullptr};
}

RoutingRoom::RoutingRoom(const Config& config, int ranks, int rank, const Int64s& topk_idx) {
  const Placement placement{config.experts, ranks};
  view.tokens = static_cast<int64_t>(topk_idx.size()) / config.topk;
  view.topk_idx = topk_idx.data();
  routes.resize(view.tokens * std::min(config.topk, ranks));
  view.routes = routes.data();
  rows_per_expert.resize(placement.count(rank));
  view.rows_per_expert = rows_per_expert.data();
}

RoutingRoom::RoutingRoom(const Scenario& s, int rank)
    : RoutingRoom(s.config, static_cast<int>(s.ranks.size()), rank, s.ranks[rank].topk_idx) {
  const RankCase& r = s.ranks[rank];
  if (!r.grouped) return;
  places.resize(r.topk_idx.size());
  view.places = places.data();
  offsets.resize(rows_per_expert.size() + 1);
  view.offsets = offsets.data();
  view.shape.align = r.align;
}

namespace {

// Metadata of what comes.
void make_room(Dispatched& d, Received& received) {
  const RankCase& r = d.mine();
  if (r.grouped) {
    d.expand_to.resize(r.expand_to.size());
    d.routing.expand_to = d.expand_to.data();
  } else {
    d.ids.resize(r.ids.size());
    received.topk_idx = d.ids.data();
  }
  d.source.resize(r.source.size());
  received.source = d.source.data();
}

// With room for just what comes, which the scenario knows.
void start_bounded(Rank& self, Dispatched& d, const Manner& manner) {
  const Scenario& s = *d.scenario;
  const RankCase& r = d.mine();
  d.totals.resize(2);
  d.routing.totals = d.totals.data();
  d.routing.results = r.results;
  d.routing.most_rows = INT32_MAX;  // all that come have room
  d.routing.rows = s.config.capacity;
  d.dropped = r.dropped;
  Received received = room_for(self, d, manner, manner.zero_copy && (!r.grouped || may_lie_grouped(self, r)));
  make_room(d, received);
  d.under_way = {self, self.comm->dispatch_bounded(rows_of(d, manner), d.routing, received, s.asked.drop,
                                                   manner.async, &d.lease, manner.held, manner.caller)};
}

}  // namespace

DispatchedPtr start_dispatch(Rank& self, const Scenario& s, const Manner& manner) {
  auto d = std::make_unique<Dispatched>();
  d->scenario = &s;
  d->rank = self.rank;
  const RankCase& r = d->mine();
  d->room = RoutingRoom(s, self.rank);
  d->routing = d->room.view;
  if (s.asked.bounded) {
    start_bounded(self, *d, manner);
    return d;
  }
  auto pending =
      self.comm->begin_dispatch(d->routing, s.asked.weights, s.asked.drop, s.asked.waves, manner.zero_copy,
                                manner.caller, format_of(s, manner, manner.scale_bytes));
  if (!r.grouped || !manner.zero_copy) check(!pending->grouped_in_slot, "rows come as they were asked for");
  if (r.grouped && manner.zero_copy && may_lie_grouped(self, r))
    check(pending->grouped_in_slot, "rows come grouped where they have room");
  check_equal(pending->rows, static_cast<int64_t>(r.rows.size()), "rows received");
  check_equal(pending->results, r.results, "rows of the result");
  if (manner.between) manner.between();
  d->dropped = pending->plan.dropped;
  d->routing.rows = pending->rows;
  Received received = room_for(self, *d, manner, r.grouped ? pending->grouped_in_slot : manner.zero_copy);
  make_room(*d, received);
  d->under_way = {self, self.comm->finish_dispatch(*pending, rows_of(*d, manner), d->routing, received,
                                                   manner.async, manner.held)};
  if (received.rows_in_slot) d->lease = pending->lease;
  d->pending = std::move(pending);
  return d;
}

namespace {

DispatchedPtr start_along(Rank& self, const Dispatched& known, const Scenario& values, const Manner& manner,
                          const Weighing& weighing) {
  auto d = std::make_unique<Dispatched>();
  d->scenario = &values;
  d->rank = self.rank;
  d->routing = known.routing;
  const bool may_stay = !d->mine().grouped || may_lie_grouped(self, d->mine());
  Received received = room_for(self, *d, manner, manner.zero_copy && may_stay && !weighing.y);
  received.weighing = weighing;
  d->under_way = {self, self.comm->redispatch(rows_of(*d, manner), d->routing, received, manner.async,
                                              &d->lease, manner.held, manner.caller)};
  return d;
}

}  // namespace

DispatchedPtr start_redispatch(Rank& self, const Dispatched& known, const Scenario& values,
                               const Manner& manner) {
  return start_along(self, known, values, manner, {});
}

Weighed start_weighing(Rank& self, const Dispatched& known, const Scenario& values, const Manner& manner) {
  const RankCase& r = values.ranks[self.rank];
  Weighed weighed{Buffer(r.results * values.weight_bytes()), nullptr};
  const Weighing weighing{r.y.data(), values.row_bytes(), r.y_weights.data(), weighed.dots.data(),
                          values.config.dtype};
  weighed.rows = start_along(self, known, values, manner, weighing);
  return weighed;
}

void check_bytes(const void* got, const Buffer& wanted, const char* what) {
  const Buffer here(wanted.bytes());
  copy_bytes(here.data(), got, static_cast<size_t>(wanted.bytes()));
  check(std::memcmp(here.data(), wanted.data(), static_cast<size_t>(wanted.bytes())) == 0, what);
}

CombinedPtr start_combine(Rank& self, const Dispatched& known, const Scenario& values, const Manner& manner) {
  const RankCase& r = values.ranks[self.rank];
  auto c = std::make_unique<Combined>();
  CombineInput input;
  input.y = r.y.data();
  input.stride = values.row_bytes();
  input.count = r.results;
  input.format = format_of(values, manner, 0);
  input.dtype = values.config.dtype;
  if (r.weighted) input.weights = r.y_weights.data();
  std::shared_ptr<SlotLease> lent;
  const bool may_stay = r.grouped ? may_lie_grouped(self, r) : !r.weighted;
  if (may_stay && manner.combine != RowsOf::tensor) {
    std::shared_ptr<SlotLease> lease = known.lease;
    if (manner.combine == RowsOf::lent_slot) lease = lent = lend_slot(self);
    if (lease) {
      copy_bytes(lease->slot().rows, r.y.data(), static_cast<size_t>(r.y.bytes()));
      input.y = lease->slot().rows;
    }
  }
  input.has_weight_grads = values.asked.weight_grads;
  if (input.has_weight_grads) {
    input.weight_grads = r.weight_grads.data();
    c->out_weights = Buffer(r.out_weights.bytes());
  }
  if (r.biased) {
    input.bias = r.bias.data();
    input.bias_stride = values.row_bytes();
  }
  c->out = room(self, r.out.bytes());
  std::byte* out_weights = input.has_weight_grads ? c->out_weights.data() : nullptr;
  c->under_way = {self, self.comm->combine(input, known.routing, c->out.data(), out_weights, manner.async,
                                           manner.held, manner.caller)};
  return c;
}

void run_operation(Rank& self, OpKind op, const Dispatched& known, const Scenario& values,
                   const Manner& manner) {
  if (op == OpKind::dispatch) return start_dispatch(self, values, manner)->under_way.wait();
  if (op == OpKind::redispatch) return start_redispatch(self, known, values, manner)->under_way.wait();
  start_combine(self, known, values, manner)->under_way.wait();
}

void check_redispatch(const Dispatched& d) {
  d.under_way.wait();
  const RankCase& r = d.mine();
  check_bytes(d.data(), r.received, "rows are in source-then-token order, and bit by bit those sent");
  if (d.scenario->asked.weights) check_bytes(d.weights.data(), r.received_weights, "weights are right");
}

void check_weighing(const Weighed& weighed) {
  const Dispatched& d = *weighed.rows;
  d.under_way.wait();
  const RankCase& r = d.mine();
  const Config& config = d.scenario->config;
  check_bytes(d.data(), r.weighed, "rows are those sent times their weights, bit by bit, zeros in padding");
  if (d.scenario->asked.weights) check_bytes(d.weights.data(), r.received_weights, "weights are right");
  // Both backends sum at least 32 parts and those as a tree; so many roundings touch a product.
  const double roundings = static_cast<double>(config.hidden) / 32 + 10;
  const double bound = roundings * (config.dtype == DType::f64 ? 0x1p-53 : 0x1p-24);
  const Buffer dots(weighed.dots.bytes());
  copy_bytes(dots.data(), weighed.dots.data(), static_cast<size_t>(dots.bytes()));
  for (int64_t i = 0; i < r.results; ++i) {
    const double dot = config.dtype == DType::f64 ? dots.as<double>()[i] : dots.as<float>()[i];
    check(std::fabs(dot - r.dots[i]) <= bound * r.dot_magnitudes[i],
          "products with y are right, 0 in padding");
  }
}

const std::byte* Dispatched::scales_data(const Communicator& comm) const {
  if (!lease) return scales.data();
  RowFormat format;
  format.type = 1;
  format.bytes = scenario->row_bytes();
  format.scale_bytes = scale_bytes;
  return lease->slot().rows + comm.layout().with(format).scales().at;
}

void check_scales(const Rank& self, const Dispatched& d, const Int64s& source) {
  Buffer wanted(d.mine().results * d.scale_bytes);
  for (int64_t i = 0; i < wanted.bytes(); ++i) {
    const int64_t row = i / d.scale_bytes, rank = source[row * 2], token = source[row * 2 + 1];
    wanted.data()[i] = rank < 0 ? std::byte{0} : scale_of(rank, token, i % d.scale_bytes);
  }
  check_bytes(d.scales_data(*self.comm), wanted, "scales are those that came with each row, 0 in padding");
}

void check_dispatch(const Dispatched& d) {
  check_redispatch(d);
  const RankCase& r = d.mine();
  check(d.source == r.source, "each row's source rank and token are right, -1 in padding");
  check(d.ids == (r.grouped ? Int64s{} : r.ids), "each row's local expert ids are right");
  check(d.room.rows_per_expert == r.rows_per_expert, "counts are right for each expert");
  check(d.room.offsets == r.offsets, "offsets of the groups are right");
  check(d.expand_to == r.expand_to, "expand_to of rows in the groups are right");
  check_equal(d.dropped, r.dropped, "rows dropped");
  if (d.scenario->asked.bounded) {
    check_equal(d.totals[0], static_cast<int64_t>(r.rows.size()), "unique rows are counted on the device");
  }
}

void check_expert(Rank& self, const Dispatched& d, int64_t expert) {
  wait_expert(*self.comm, *d.pending, d.under_way.ticket(), expert);
  const RankCase& r = d.mine();
  const auto same = [&](const void* got, const void* wanted, int64_t row_bytes) {
    const int64_t from = r.offsets[expert] * row_bytes, bytes = r.offsets[expert + 1] * row_bytes - from;
    const auto* a = static_cast<const std::byte*>(got);
    return std::equal(a + from, a + from + bytes, static_cast<const std::byte*>(wanted) + from);
  };
  const Scenario& s = *d.scenario;
  check(same(d.data(), r.received.data(), s.row_bytes()), "the expert's rows and padding are in place");
  if (s.asked.weights)
    check(same(d.weights.data(), r.received_weights.data(), s.weight_bytes()), "so are their weights");
  check(same(d.source.data(), r.source.data(), 2 * sizeof(int64_t)), "and where they are from");
}

void check_combine(const Rank& self, const Combined& c, const Scenario& values) {
  c.under_way.wait();
  const RankCase& r = values.ranks[self.rank];
  check_bytes(c.out.data(), r.out, "the sum is that of the documented order, bit by bit");
  if (values.asked.weight_grads)
    check_bytes(c.out_weights.data(), r.out_weights, "weight gradients are right");
}

void check_round_trip(Rank& self, const Scenario& first, const Scenario& second, const Manner& manner) {
  const DispatchedPtr d = start_dispatch(self, first, manner);
  check_dispatch(*d);
  const DispatchedPtr again = start_redispatch(self, *d, second, manner);
  check_redispatch(*again);
  check_combine(self, *start_combine(self, *d, first, manner), first);
  Manner owned = manner;
  owned.zero_copy = false;  // weighed rows are new ones
  check_weighing(start_weighing(self, *d, second, owned));
}

}  // namespace commlib::testing
