// How operations run on the CPU: as jobs of the pool, or, where the caller waits for it, on its own thread.
#include <memory>
#include <utility>
#include <vector>

#include "cpu/communicator.h"

namespace commlib {

// What a plan needs while it is made.
struct PlanScratch {
  std::vector<uint32_t> counts;
  PlanShared<1> shared{};

  PlanScratch(PlanOp& op, const uint8_t* owner) : counts(4 * op.routing.placement.experts) {
    const int64_t experts = op.routing.placement.experts;
    op.routing.owner = owner;
    op.expert_counts = counts.data();
    op.worker_counts = counts.data() + experts;
    op.group_rows = counts.data() + 2 * experts;
    op.group_begins = counts.data() + 3 * experts;
  }
};

PlanReport CpuCommunicator::execute_plan(const OpId& id, PlanOp op) {
  PlanScratch scratch(op, owner_.data());
  const auto context = context_of(id);
  CpuWorker caller(*context, 0, 1);
  PlanReport report{};
  const auto tell = [&](PlanStatus status) {
    report_plan(caller, op, peers_, scratch.shared, status, report);
  };
  if (!run_plan(caller, op, peers_, scratch.shared, tell)) raise_failed(*context);
  return report;
}

Ticket CpuCommunicator::execute_rows(const OpId& id, const RowsOp& op, Execution execution) {
  if (id.call.has(kCallInWaves)) return execute_waves(id, op, std::move(execution));
  const auto part = [this, id, op](CpuWorker& w, Job&) { run_rows(w, op, peers_, id); };
  return start(id, part, std::move(execution));
}

Ticket CpuCommunicator::execute_waves(const OpId& id, RowsOp op, Execution execution) {
  const auto waves_of_routes = std::make_shared<std::vector<uint8_t>>(op.send.tokens * width_);
  op.waves_of_routes = waves_of_routes->data();
  const auto part = [this, id, op, waves_of_routes](CpuWorker& w, Job& job) {
    run_waves(w, op, peers_, id, [&](int wave) { pool_->unpacked(job, wave); });
  };
  return start(id, part, std::move(execution));
}

// One worker plans, and the others wait for it.
Ticket CpuCommunicator::execute_bounded(const OpId& id, PlanOp plan, const RowsOp& op, Execution execution) {
  const auto scratch = std::make_shared<PlanScratch>(plan, owner_.data());
  const auto part = [this, id, plan, op, scratch](CpuWorker& w, Job&) {
    const bool planned = w.prepared([&] {
      CpuWorker alone = w.alone();
      return run_bounded_plan(alone, plan, peers_, scratch->shared,
                              [&](const Trouble& trouble) { note_trouble(trouble); });
    });
    if (planned) run_rows(w, op, peers_, id);
  };
  return last_bounded_ = start(id, part, std::move(execution));
}

// A bounded plan is made by the pool, in its turn; any other by the thread that calls, at once.
void CpuCommunicator::plan_after_plans() {
  if (last_bounded_ && !last_bounded_->done.load(std::memory_order_acquire)) plan_after_all();
  last_bounded_ = nullptr;
}

void CpuCommunicator::note_trouble(const Trouble& trouble) {
  std::lock_guard<std::mutex> lock(trouble_mutex_);
  if (!trouble_) trouble_ = trouble;
}

std::optional<Trouble> CpuCommunicator::take_trouble() {
  std::lock_guard<std::mutex> lock(trouble_mutex_);
  return std::exchange(trouble_, std::nullopt);
}

Ticket CpuCommunicator::execute_combine(const OpId& id, const CombineOp& op, Execution execution) {
  const auto part = [this, id, op](CpuWorker& w, Job&) { run_combine(w, op, peers_, id); };
  return start(id, part, std::move(execution));
}

void CpuCommunicator::await_pulls(Call call, const std::shared_ptr<SlotLease>&) {
  const OpId id{call, sequence_.last_pull[call.slot]};
  const auto context = context_of(id);
  CpuWorker caller(*context, 0, 1);
  if (!await_slot(caller, peers_)) raise_failed(*context);
}

void CpuCommunicator::collect_slots() {
  if (config_.let_go) config_.let_go();
}

void CpuCommunicator::check_routes(const RoutePlan& routing) const {
  const auto check = [&](const char* name, const int64_t* routes, int width, auto most_rows) {
    for (int64_t i = 0; i < routing.tokens * width; ++i) {
      const int64_t route = routes[i];
      if (route == kNoRoute ||
          (route >= 0 && rank_of(route) < config_.size && row_of(route) < most_rows(rank_of(route)))) {
        continue;
      }
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i / width) + ", " +
                                  std::to_string(i % width) + "] is " + std::to_string(route) +
                                  ", which is no row of any rank: routings come "
                                  "from a dispatch on this communicator, and may not be changed");
    }
  };
  check("routes", routing.routes, width_, [&](int) { return config_.capacity; });
  if (!uses_places(routing)) return;
  // This rank's own rows may be more than a slot holds: then it has them elsewhere.
  const int64_t own = std::max(routing.offsets[placement_.count(config_.rank)], layout_.grouped_rows);
  check("places", routing.places, config_.topk,
        [&](int p) { return p == config_.rank ? own : layout_.grouped_rows; });
}

Ticket CpuCommunicator::start(const OpId& id, Part part, Execution execution) {
  const auto op = context_of(id);
  auto job = std::make_shared<Job>();
  job->held = std::move(execution.held);
  job->run = [this, op, part = std::move(part), unchecked = execution.unchecked, job = job.get()](int index) {
    CpuWorker w(*op, index, config_.num_sms);
    const auto check = [&] { return unchecked ? check_routes(*unchecked), true : true; };
    if (w.may_begin() && (!unchecked || w.prepared(check))) part(w, *job);
  };
  job->finish = [this, op, lease = std::move(execution.lease),
                 when_done = std::move(execution.when_done)]() mutable {
    lease.reset();
    if (when_done) when_done();
    if (op->failed.load(std::memory_order_acquire)) raise_failed(*op);
  };
  job->abandon = [this, op](const std::exception_ptr& error) { abandon(*op, error); };
  if (!execution.async) {
    pool_->run(job, [this] { give_up("it was interrupted (Ctrl-C) behind other operations"); });
    return job;
  }
  op->interrupted = nullptr;  // worker 0 is a thread of the pool's
  pool_->submit(job);
  return job;
}

void CpuCommunicator::raise_failed(OpContext& op) {
  std::unique_lock<std::mutex> lock(op.mutex);
  const FailureRecord record = op.record;
  lock.unlock();
  raise(record);
}

void CpuCommunicator::abandon(OpContext& op, const std::exception_ptr& error) {
  std::string why = "a communication thread failed";
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    why += std::string(": ") + e.what();
  } catch (...) {
  }
  op.failed.store(true, std::memory_order_release);
  give_up(why);
}

void CpuCommunicator::bare_send(const Rows& rows, const RoutePlan& routing) {
  const auto context = context_of({});
  CpuWorker w(*context, 0, 1);
  Lent lent{};
  SendPlan plan = send_plan(rows, routing);
  plan.weights = nullptr;
  lent.grouped = plan.places ? peers_.all() : 0;
  plan.lent = &lent;
  send_rows(w, plan, peers_);
  w.flush();
}

void CpuCommunicator::bare_pull(const RoutePlan& routing, std::byte* out) {
  const auto context = context_of({});
  CpuWorker w(*context, 0, 1);
  Lent lent{};
  LocalSumPlan no_sum{};
  no_sum.dtype = config_.dtype;
  no_sum.hidden = config_.hidden;
  no_sum.layout = layout_;
  PullPlan plan = pull_plan({}, routing, no_sum, out, nullptr);
  lent.grouped = plan.places ? peers_.all() : 0;
  plan.lent = &lent;
  pull_rows(w, plan, peers_);
  w.flush();
}

}  // namespace commlib
