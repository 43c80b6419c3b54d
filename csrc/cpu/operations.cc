// dispatch, dispatch with a handle, and combine on the CPU: which thread does what, in which order.
#include <algorithm>
#include <vector>

#include "cpu/communicator.h"
#include "protocol/operations.h"

namespace commlib {

namespace {

bool another_failed(const OpContext& op) { return op.failed.load(std::memory_order_acquire); }

}  // namespace

// Says which operation this rank calls and which slot it lends; every operation on every rank begins with it.
uint64_t CpuCommunicator::announce(Call call) {
  auto op = context(call, ++epoch_);
  CpuWorker caller(*op, 0, 1);
  publish_call(caller, peers_, op->id);
  return epoch_;
}

// Waits until no rank pulls from a slot that is about to be written.
void CpuCommunicator::await_writable(const SlotLease& lease, Call call) {
  auto op = context(call, lease.last_pull());
  CpuWorker caller(*op, 0, 1);
  if (!await_pulled(caller, peers_, lease.last_pull())) raise_failed(*op);
}

std::shared_ptr<SlotLease> CpuCommunicator::take_writable_slot(Call call) {
  auto lease = take_slot();
  await_writable(*lease, call);
  return lease;
}

std::shared_ptr<SlotLease> CpuCommunicator::lend_slot() {
  const Issue issue(*this);
  auto lease = take_writable_slot({OpKind::combine, 0, 0});
  lease->lend();
  return lease;
}

Ticket CpuCommunicator::start(std::shared_ptr<OpContext> op, Part part, std::function<void()> last,
                              bool async, Held held) {
  auto job = std::make_shared<Job>();
  job->held = std::move(held);
  job->run = [this, op, part = std::move(part), job = job.get()](int index) {
    CpuWorker w(*op, index, config_.num_sms);
    if (w.may_begin()) part(w, *job);
  };
  job->finish = [this, op, last = std::move(last)] {
    last();
    if (another_failed(*op)) raise_failed(*op);
  };
  job->abandon = [this, op](const std::exception_ptr& error) { abandon(*op, error); };
  if (!async) {
    pool_->run(job, [this] { give_up("it was interrupted (Ctrl-C) behind other operations"); });
    return job;
  }
  op->interrupted = nullptr;  // worker 0 is a thread of the pool's
  try {
    pool_->submit(job);
  } catch (const std::exception& e) {  // others already know of the call
    give_up(e.what());
    throw;
  }
  return job;
}

// Rows on their way through one slot, with or without a plan of their own.
struct CpuCommunicator::Transfer {
  std::shared_ptr<OpContext> op;
  std::shared_ptr<SlotLease> lease;
  SendPlan send{};
  UnpackPlan unpack{};
  std::vector<uint8_t> waves_of_routes;  // [tokens][width]; in waves only
  // Own copies, because the caller's may be gone by then.
  std::vector<uint8_t> slots;  // [ranks]; empty: to be collected
  std::vector<int64_t> source_rows, offsets, rows_per_expert;
};

Ticket CpuCommunicator::start_transfer(std::shared_ptr<Transfer> t, bool async, Held held) {
  if (t->unpack.expand_to) {
    const UnpackPlan& d = t->unpack;
    t->offsets.assign(d.offsets, d.offsets + d.experts + 1);
    t->rows_per_expert.assign(d.rows_per_expert, d.rows_per_expert + d.experts);
    t->unpack.offsets = t->offsets.data();
    t->unpack.rows_per_expert = t->rows_per_expert.data();
  }
  if (!t->source_rows.empty()) t->unpack.source_rows = t->source_rows.data();
  if (!t->slots.empty()) t->send.slots = t->slots.data();
  const auto part = [this, t](CpuWorker& w, Job& job) {
    const OpId& id = t->op->id;
    id.call.has(kCallInWaves) ? run_in_waves(*t, w, job) : run_dispatch(w, t->send, t->unpack, peers_, id);
  };
  return start(t->op, part, [t] { t->lease.reset(); }, async, std::move(held));
}

void CpuCommunicator::run_in_waves(Transfer& t, CpuWorker& w, Job& job) {
  move_in_waves(w, t.send, t.unpack, t.waves_of_routes.data(), peers_, t.op->id.epoch,
                [&](int wave) { pool_->unpacked(job, wave); });
}

std::unique_ptr<PendingDispatch> CpuCommunicator::begin_dispatch(const RoutePlan& routing, bool has_weights,
                                                                 bool drop, bool in_waves) {
  const Issue issue(*this);
  auto pending = std::make_unique<PendingDispatch>();
  Call call = dispatch_call(has_weights, drop, in_waves);
  const RouterOutput in = router_output_of(routing, owner_.data());
  std::vector<uint32_t> per_rank(config_.size), per_expert(config_.experts);
  const SourceCounts counts{per_rank.data(), per_expert.data()};
  auto planning = context(call, epoch_);
  CpuWorker planner(*planning, 0, 1);
  const int64_t bad = count_routes(planner, in, routing.routes, counts);
  if (bad != kNoBadId) raise_bad_id(bad, routing.topk_idx[bad]);

  pending->lease = take_writable_slot(call);
  call.slot = static_cast<uint8_t>(pending->lease->index());
  pending->call = call;
  announce(call);
  pending->epoch = epoch_;
  auto op = context(call, pending->epoch);
  CpuWorker caller(*op, 0, 1);
  std::vector<int64_t> base(config_.size), received(config_.size);
  pending->source_rows.resize(config_.size);
  pending->slots.resize(config_.size);
  const CountsResult result{base.data(), received.data(), pending->source_rows.data(),
                            routing.rows_per_expert, pending->lease->slot().group_firsts};
  const auto exchange = [&] {
    publish_counts(caller, peers_, placement_, counts, ++dispatches_);
    if (!collect_counts(caller, peers_, placement_, dispatches_, result)) raise_failed(*op);
  };
  exchange();
  if (!collect_calls(caller, peers_, op->id, pending->slots.data())) raise_failed(*op);
  const auto fullest = std::max_element(received.begin(), received.end());
  const bool overflow = *fullest > config_.capacity;
  if (overflow && !drop) {
    // Nothing of this call holds a slot, so only this bounds how many a rank may be ahead (kCallRing).
    drain_or_give_up("it was interrupted (Ctrl-C) in a dispatch");
    raise_overflow(fullest - received.begin(), *fullest);
  }
  place_routes(caller, in, routing.routes, base.data());
  std::vector<uint32_t> next(config_.experts);
  number_rows_of_experts(caller, in, pending->lease->slot().sent_ordinals, next.data());
  if (overflow) {
    // All ranks see the same overflow in the counts, so all take this second round.
    pending->dropped = drop_overflow(caller, in, routing.routes, counts, config_.capacity);
    exchange();
  }
  pending->rows = pending->results = received[config_.rank];
  if (routing.offsets) {
    pending->results = group_offsets(caller, routing.rows_per_expert, placement_.count(config_.rank),
                                     routing.align, routing.offsets);
  }
  begin_turn(*pending);
  return pending;
}

Ticket CpuCommunicator::finish_dispatch(PendingDispatch& pending, const Rows& rows, const RoutePlan& routing,
                                        const Received& received, bool async, Held held) {
  const Issue issue(*this, Issue::Of::pending_dispatch);
  auto t = std::make_shared<Transfer>();
  t->op = context(pending.call, pending.epoch);
  t->unpack = unpack_plan(routing, received, *pending.lease);
  t->lease = received.rows_in_slot ? pending.lease : std::move(pending.lease);
  t->send = send_plan(rows, routing);
  t->send.ordinals = t->lease->slot().sent_ordinals;
  t->slots = pending.slots;
  t->source_rows = pending.source_rows;
  if (pending.in_waves()) t->waves_of_routes.resize(rows.count * width_);
  const Ticket ticket = start_transfer(std::move(t), async, std::move(held));
  end_turn(pending);
  return ticket;
}

// For a caller who brings a routing: other ranks' memory is written and read where it says.
void CpuCommunicator::check_routes(const RoutePlan& routing) const {
  for (int64_t i = 0; i < routing.tokens * width_; ++i) {
    const int64_t route = routing.routes[i];
    if (route == kNoRoute ||
        (route >= 0 && rank_of(route) < config_.size && row_of(route) < config_.capacity)) {
      continue;
    }
    throw std::invalid_argument("routes[" + std::to_string(i / width_) + ", " + std::to_string(i % width_) +
                                "] is " + std::to_string(route) +
                                ", which is no row of any rank: routings come "
                                "from a dispatch on this communicator, and may not be changed");
  }
}

Ticket CpuCommunicator::redispatch(const Rows& rows, const RoutePlan& routing, const Received& received,
                                   bool async, std::shared_ptr<SlotLease>* lease, Held held) {
  const Issue issue(*this);
  check_routes(routing);
  Call call = redispatch_call(rows);
  auto t = std::make_shared<Transfer>();
  t->lease = take_writable_slot(call);
  if (received.rows_in_slot) *lease = t->lease;
  call.slot = static_cast<uint8_t>(t->lease->index());
  t->op = context(call, announce(call));
  t->send = send_plan(rows, routing);
  t->unpack = unpack_plan(routing, received, *t->lease);
  return start_transfer(std::move(t), async, std::move(held));
}

Ticket CpuCommunicator::combine(const CombineInput& input, const RoutePlan& routing, std::byte* out,
                                std::byte* out_weights, bool async, Held held) {
  const Issue issue(*this);
  check_routes(routing);
  check_out(out);
  Call call = combine_call(input);
  CombineSlot slot = combine_slot(input, routing);
  if (!slot.in_place) await_writable(*slot.lease, call);
  call.slot = static_cast<uint8_t>(slot.lease->index());
  const LocalSumPlan local_sum = local_sum_plan(input, routing, slot);
  const PullPlan pull = pull_plan(input, routing, local_sum, out, out_weights);

  auto op = context(call, announce(call));
  const auto part = [this, op, local_sum, pull, users_rows = slot.users_rows](CpuWorker& w, Job&) {
    run_combine(w, local_sum, pull, peers_, op->id, users_rows, true);
  };
  const auto last = [lease = std::move(slot.lease), epoch = epoch_] { lease->pulled_in(epoch); };
  return start(op, part, last, async, std::move(held));
}

void CpuCommunicator::bare_send(const Rows& rows, const RoutePlan& routing) {
  auto op = context({}, 0);
  CpuWorker w(*op, 0, 1);
  const std::vector<uint8_t> slots(config_.size);
  SendPlan plan = send_plan(rows, routing);
  plan.weights = nullptr;
  plan.slots = slots.data();
  send_rows(w, plan, peers_);
  w.flush();
}

void CpuCommunicator::bare_pull(const RoutePlan& routing, std::byte* out) {
  auto op = context({}, 0);
  CpuWorker w(*op, 0, 1);
  const std::vector<uint8_t> slots(config_.size);
  PullPlan plan = pull_plan({}, routing, {}, out, nullptr);
  plan.slots = slots.data();
  pull_rows(w, plan, peers_);
  w.flush();
}

}  // namespace commlib
