// dispatch, dispatch with a handle, and combine: which worker does what, in which order.
#include <algorithm>
#include <cstring>

#include "cpu/communicator.h"

namespace commlib {

namespace {

bool another_failed(const OpContext& op) { return op.failed.load(std::memory_order_acquire); }

void check_routes(const BadExpert& bad, int64_t experts) {
  if (bad.token < 0) return;
  throw std::invalid_argument("topk_idx[" + std::to_string(bad.token) + ", " + std::to_string(bad.place) +
                              "] is " + std::to_string(bad.value) + "; expert ids lie in [0, " +
                              std::to_string(experts) + "), and -1 leaves a place empty");
}

}  // namespace

// Says which operation this rank calls and which slot it lends; every operation on every rank begins so.
uint32_t Communicator::announce(Call call) {
  const uint32_t epoch = ++epoch_;
  auto op = context(call, epoch);
  CpuWorker caller(*op, 0, 1);
  publish_call(caller, peers_, epoch, call);
  return epoch;
}

// How far each source's `arrived` counter must have come for the operation about to start.
std::vector<uint64_t> Communicator::next_arrivals() {
  ++moves_;
  std::vector<uint64_t> expected;
  for (int workers : workers_) expected.push_back(moves_ * static_cast<uint64_t>(workers));
  return expected;
}

std::shared_ptr<SlotLease> Communicator::take_slot(Call call) {
  auto lease = slots_->take();
  if (!lease) {
    pool_->drain();  // operations under way give theirs back
    lease = slots_->take();
  }
  if (!lease) {
    throw SlotError("all " + std::to_string(config_.slots) +
                    " slots are in use by zero-copy results or lent buffers: release a handle "
                    "(handle.release(), or let its tensors go), or make the communicator with more slots");
  }
  uint32_t epoch;
  if (slots_->last_pull(lease->index(), &epoch)) {  // nobody may still pull from what is about to be written
    auto op = context(call, epoch);
    CpuWorker caller(*op, 0, 1);
    if (!await_pulled(caller, peers_, epoch)) raise(*op);
  }
  return lease;
}

std::shared_ptr<SlotLease> Communicator::lend_slot() {
  std::lock_guard<std::mutex> issue(issue_mutex_);
  check_usable();
  auto lease = take_slot({OpKind::combine, 0, 0});
  lease->lend();
  return lease;
}

Ticket Communicator::start(std::shared_ptr<Job> job, bool async) {
  if (async) {
    pool_->submit(job);
  } else {
    pool_->run(job);
  }
  return job;
}

SendPlan Communicator::send_plan(const Rows& rows, const RoutingView& routing) const {
  SendPlan plan{};
  plan.tokens = rows.count;
  plan.topk = config_.topk;
  plan.width = width_;
  plan.x = rows.x;
  plan.x_stride = rows.stride;
  plan.routes = routing.routes;
  plan.topk_idx = routing.topk_idx;
  plan.weights = rows.weights;
  plan.placement = placement_;
  plan.layout = layout_;
  return plan;
}

StagePlan Communicator::stage_plan(const CombineInput& input, const RoutingView& routing,
                                   const SlotLease& lease, bool in_place) const {
  StagePlan plan{};
  plan.dtype = config_.dtype;
  plan.hidden = config_.hidden;
  plan.topk = config_.topk;
  plan.rows = routing.rows;
  plan.y = in_place ? nullptr : input.y;
  plan.y_stride = input.stride;
  plan.places = routing.places;
  plan.weights = input.weights;
  plan.weight_grads = input.weight_grads;
  plan.layout = layout_;
  plan.slot = lease.slot();
  return plan;
}

PullPlan Communicator::pull_plan(const RoutingView& routing, std::byte* out) const {
  PullPlan plan{};
  plan.dtype = config_.dtype;
  plan.hidden = config_.hidden;
  plan.tokens = routing.tokens;
  plan.topk = config_.topk;
  plan.width = width_;
  plan.routes = routing.routes;
  plan.topk_idx = routing.topk_idx;
  plan.out = out;
  plan.placement = placement_;
  plan.layout = layout_;
  return plan;
}

// Rows on their way through one slot, with or without a plan of their own.
struct Communicator::Transfer {
  Transfer(int workers) : barrier(workers) {}

  std::shared_ptr<OpContext> op;
  std::shared_ptr<SlotLease> lease;
  SendPlan send;
  bool slots_known;  // a fresh dispatch has read everyone's call with the counts
  std::vector<uint64_t> arrivals;
  std::vector<int64_t> source_rows;  // fresh only
  std::vector<int64_t> offsets;      // own copies, for padding: the caller's may be gone by then
  std::vector<int64_t> rows_per_expert;
  RoutingView routing;
  Received received;
  WorkerBarrier barrier;

  // Metadata of unique rows as it lies in the slot -> what the caller asked for.
  void deliver_metadata(CpuWorker& w, int topk, int64_t wb) const;
  void zero_padding(CpuWorker& w, DType dtype, int64_t hidden, const SlotLayout& layout) const;
};

void Communicator::Transfer::deliver_metadata(CpuWorker& w, int topk, int64_t wb) const {
  const Slot slot = lease->slot();
  const auto [begin, end] = w.share(routing.rows);
  size_t source = 0;
  int64_t source_end = source_rows.empty() ? routing.rows : source_rows[0];
  for (int64_t n = begin; n < end; ++n) {
    while (n >= source_end) source_end += source_rows[++source];
    const int64_t origin[2] = {static_cast<int64_t>(source), slot.tokens[n]};
    if (received.source && !routing.places) std::memcpy(received.source + n * 2, origin, sizeof origin);
    for (int k = 0; routing.places && k < topk; ++k) {
      const int64_t to = routing.places[n * topk + k];
      if (to < 0) continue;
      if (received.weights) w.copy_scalar(received.weights + to * wb, slot.weights + (n * topk + k) * wb, wb);
      if (received.source) std::memcpy(received.source + to * 2, origin, sizeof origin);
    }
  }
  if (routing.places) return;
  const int64_t i = begin * topk, count = (end - begin) * topk;
  if (received.weights)
    std::memcpy(received.weights + i * wb, slot.weights + i * wb, static_cast<size_t>(count * wb));
  if (received.topk_idx) std::copy_n(slot.experts + i, count, received.topk_idx + i);
}

void Communicator::Transfer::zero_padding(CpuWorker& w, DType dtype, int64_t hidden,
                                          const SlotLayout& layout) const {
  const int64_t wb = layout.weight_bytes;
  const auto experts = static_cast<int64_t>(rows_per_expert.size());
  for (int64_t e = w.index(); e < experts; e += w.count()) {
    for (int64_t row = offsets[e] + rows_per_expert[e]; row < offsets[e + 1]; ++row) {
      w.reduce(dtype, received.rows + row * layout.row_bytes, nullptr, nullptr, 0, hidden);
      if (received.weights) w.copy_scalar(received.weights + row * wb, nullptr, wb);
      if (received.source) received.source[row * 2] = received.source[row * 2 + 1] = -1;
    }
  }
}

Ticket Communicator::start_transfer(std::shared_ptr<Transfer> t, bool async) {
  t->arrivals = next_arrivals();
  if (t->routing.places) {
    const int64_t experts = placement_.count(config_.rank);
    t->offsets.assign(t->routing.offsets, t->routing.offsets + experts + 1);
    t->rows_per_expert.assign(t->routing.rows_per_expert, t->routing.rows_per_expert + experts);
  }
  auto job = std::make_shared<Job>();
  job->run = [this, t](int index) {
    CpuWorker w(*t->op, index, config_.workers);
    SendPlan send = t->send;
    if (!t->slots_known && !collect_calls(w, peers_, t->op->epoch, t->op->call, send.slots)) return;
    send_metadata(w, send, peers_);
    send_rows(w, send, peers_);
    arrive(w, peers_);
    if (!await_arrivals(w, peers_, t->arrivals.data())) return;
    const bool fresh = send.with_experts;
    if (t->routing.places && fresh) {
      if (index == 0) {
        std::vector<int64_t> next(t->offsets);
        group_rows(t->lease->slot().experts, t->routing.rows, config_.topk, next.data(), t->routing.places);
      }
      if (!t->barrier.wait(config_.spin, [&] { return another_failed(*t->op); })) return;
    }
    if (t->received.rows) {
      const ReplicatePlan plan{t->lease->slot(), layout_,           t->routing.rows,
                               config_.topk,     t->routing.places, t->received.rows};
      replicate_rows(w, plan);
      if (t->routing.places) t->zero_padding(w, config_.dtype, config_.hidden, layout_);
    }
    if (fresh || t->received.weights) t->deliver_metadata(w, config_.topk, layout_.weight_bytes);
    w.flush();
  };
  job->finish = [this, t] {
    t->lease.reset();
    if (another_failed(*t->op)) raise(*t->op);
  };
  return start(std::move(job), async);
}

std::unique_ptr<PendingDispatch> Communicator::begin_dispatch(const RoutingView& routing, bool has_weights,
                                                              bool drop) {
  std::lock_guard<std::mutex> issue(issue_mutex_);
  check_usable();
  auto pending = std::make_unique<PendingDispatch>();
  Call call{OpKind::dispatch, 0,
            static_cast<uint16_t>((has_weights ? kCallHasWeights : 0) | (drop ? kCallDrops : 0))};
  const Routing in{routing.topk_idx, routing.tokens, config_.topk, width_, placement_, owner_.data()};
  std::vector<uint32_t> per_rank(config_.size), per_expert(config_.experts);
  const SourceCounts counts{per_rank.data(), per_expert.data()};
  check_routes(count_routes(in, routing.routes, counts), config_.experts);

  pending->lease = take_slot(call);
  call.slot = static_cast<uint8_t>(pending->lease->index());
  pending->call = call;
  pending->epoch = announce(call);
  auto op = context(call, pending->epoch);
  CpuWorker caller(*op, 0, 1);
  std::vector<int64_t> base(config_.size), received(config_.size);
  pending->source_rows.resize(config_.size);
  pending->rows_per_expert.resize(placement_.count(config_.rank));
  pending->slots.resize(config_.size);
  const CountsResult result{base.data(), received.data(), pending->source_rows.data(),
                            pending->rows_per_expert.data()};
  const auto exchange = [&] {
    publish_counts(caller, peers_, placement_, counts, ++dispatches_);
    if (!collect_counts(caller, peers_, placement_, dispatches_, result)) raise(*op);
  };
  exchange();
  if (!collect_calls(caller, peers_, pending->epoch, call, pending->slots.data())) raise(*op);
  const auto fullest = std::max_element(received.begin(), received.end());
  if (*fullest > config_.capacity) {
    if (!drop) {
      // Nothing of this call holds a slot, so only this bounds how many a rank may be ahead (kCallRing).
      pool_->drain();
      throw CapacityError("rank " + std::to_string(fullest - received.begin()) + " would receive " +
                          std::to_string(*fullest) + " rows, and capacity is " +
                          std::to_string(config_.capacity) +
                          "; nothing was sent. Raise capacity, or dispatch with overflow=\"drop\"");
    }
    // Everyone sees the same overflow in the counts, so everyone takes this second round.
    pending->dropped = drop_overflow(in, routing.routes, counts, base.data(), config_.capacity);
    exchange();
  }
  pending->rows = received[config_.rank];
  place_routes(in, routing.routes, base.data());
  return pending;
}

Ticket Communicator::finish_dispatch(PendingDispatch& pending, const Rows& rows, const RoutingView& routing,
                                     const Received& received, bool async) {
  std::lock_guard<std::mutex> issue(issue_mutex_);
  auto t = std::make_shared<Transfer>(config_.workers);
  t->op = context(pending.call, pending.epoch);
  t->lease = received.rows ? std::move(pending.lease) : pending.lease;
  t->send = send_plan(rows, routing);
  t->send.with_experts = true;
  std::copy(pending.slots.begin(), pending.slots.end(), t->send.slots);
  t->slots_known = true;
  t->source_rows = pending.source_rows;
  t->routing = routing;
  t->received = received;
  return start_transfer(std::move(t), async);
}

Ticket Communicator::redispatch(const Rows& rows, const RoutingView& routing, const Received& received,
                                bool async, std::shared_ptr<SlotLease>* lease) {
  std::lock_guard<std::mutex> issue(issue_mutex_);
  check_usable();
  Call call{OpKind::redispatch, 0, static_cast<uint16_t>(rows.has_weights ? kCallHasWeights : 0)};
  auto t = std::make_shared<Transfer>(config_.workers);
  t->lease = take_slot(call);
  if (!received.rows) *lease = t->lease;
  call.slot = static_cast<uint8_t>(t->lease->index());
  t->op = context(call, announce(call));
  t->send = send_plan(rows, routing);
  t->send.with_experts = false;
  t->slots_known = false;
  t->routing = routing;
  t->received = received;
  return start_transfer(std::move(t), async);
}

Ticket Communicator::combine(const CombineInput& input, const RoutingView& routing, std::byte* out,
                             std::byte* out_weights, bool async) {
  std::lock_guard<std::mutex> issue(issue_mutex_);
  check_usable();
  Call call{OpKind::combine, 0, static_cast<uint16_t>(input.has_weight_grads ? kCallHasWeights : 0)};
  // Rows that lie in a slot already, in their order and unweighted, are pulled from there.
  std::shared_ptr<SlotLease> lease;
  const bool plain = !routing.places && !input.weights && input.stride == layout_.row_bytes;
  if (plain && input.y) lease = slots_->find(input.y);
  const bool in_place = lease != nullptr;
  if (in_place) lease->use();
  const bool users_rows = in_place && !lease->lent();
  if (!lease) lease = take_slot(call);
  call.slot = static_cast<uint8_t>(lease->index());

  const StagePlan stage = stage_plan(input, routing, *lease, in_place);
  PullPlan pull = pull_plan(routing, out);
  pull.bias = input.bias;
  pull.bias_stride = input.bias_stride;
  pull.out_weights = out_weights;

  auto op = context(call, announce(call));
  auto barrier = std::make_shared<WorkerBarrier>(config_.workers);
  auto job = std::make_shared<Job>();
  job->run = [this, op, barrier, stage, pull, users_rows, arrivals = next_arrivals()](int index) {
    CpuWorker w(*op, index, config_.workers);
    stage_rows(w, stage);
    arrive(w, peers_);
    PullPlan mine = pull;
    if (!collect_calls(w, peers_, op->epoch, op->call, mine.slots)) return;
    if (!await_arrivals(w, peers_, arrivals.data())) return;
    pull_rows(w, mine, peers_);
    w.flush();
    if (!barrier->wait(config_.spin, [&] { return another_failed(*op); })) return;
    if (index != 0) return;
    publish_pulled(w, peers_, op->epoch);
    // Rows of a receive slot are the user's tensor, who may write it as soon as this returns; so may the next
    // operation of this rank, which puts weight gradients beside them.
    if (users_rows) await_pulled(w, peers_, op->epoch);
  };
  job->finish = [this, op, lease] {
    lease->pulled_in(op->epoch);
    if (another_failed(*op)) raise(*op);
  };
  lease.reset();
  return start(std::move(job), async);
}

void Communicator::bare_send(const Rows& rows, const RoutingView& routing) {
  auto op = context({}, 0);
  CpuWorker w(*op, 0, 1);
  SendPlan plan = send_plan(rows, routing);
  plan.weights = nullptr;
  plan.with_experts = false;
  send_rows(w, plan, peers_);
  w.flush();
}

void Communicator::bare_pull(const RoutingView& routing, std::byte* out) {
  auto op = context({}, 0);
  CpuWorker w(*op, 0, 1);
  pull_rows(w, pull_plan(routing, out), peers_);
  w.flush();
}

}  // namespace commlib
