// A rank on the CPU: its heap in shared memory, its pool of threads.
#pragma once

#include "backend/communicator.h"
#include "cpu/buffers.h"
#include "cpu/pool.h"
#include "cpu/worker.h"
#include "heap/symmetric_heap.h"

namespace commlib {

class CpuCommunicator final : public Communicator {
 public:
  explicit CpuCommunicator(const Config& config);  // makes this rank's heap
  ~CpuCommunicator() override;

  PeerAddress address() override;
  void wait(const Ticket& ticket) override;
  void wait_expert(const PendingDispatch& dispatch, const Ticket& ticket, int64_t expert,
                   uintptr_t stream) override;
  void synchronize() override;
  int64_t touched_bytes() override;

  // Memory for `rows` rows, which goes back to the communicator's pool of buffers with its last owner.
  std::shared_ptr<void> new_rows(int64_t rows);
  int64_t idle_bytes() const { return static_cast<int64_t>(buffers_->idle_bytes()); }
  const char* vector_ops_name() const { return ops_->name; }

  // For benchmarks: one worker's send_rows or pull_rows and nothing else, over the routing of a dispatch
  // whose slots are not in use. Shows the machine's own limit for this routing and these stores.
  void bare_send(const Rows& rows, const RoutePlan& routing);
  void bare_pull(const RoutePlan& routing, std::byte* out);

 private:
  PlanReport execute_plan(const OpId& id, PlanOp op) override;
  Ticket execute_rows(const OpId& id, const RowsOp& op, Execution execution) override;
  Ticket execute_waves(const OpId& id, RowsOp op, Execution execution);
  Ticket execute_bounded(const OpId& id, PlanOp plan, const RowsOp& rows, Execution execution) override;
  Ticket execute_combine(const OpId& id, const CombineOp& op, Execution execution) override;
  std::optional<Trouble> take_trouble() override;
  void await_pulls(Call call, const std::shared_ptr<SlotLease>& lease) override;
  void plan_after_all() override { drain_or_give_up("it was interrupted (Ctrl-C) in a dispatch"); }
  void plan_after_plans() override;
  void collect_slots() override;
  void check_routes(const RoutePlan& routing) const override;

  void drain() override { pool_->drain(); }
  void drain_unless_interrupted() override { pool_->drain_unless_interrupted(); }
  std::byte* map_heap(int rank, const PeerAddress& address) override;
  Signals* own_signals() override;
  void announce_departure(const Departure& departure) override;
  Departure departure_of(int rank) override;
  void has_closed() override;

  // Calls `wait`, and remembers whether the user wanted out.
  template <class Wait>
  void wait_for(Wait wait);
  std::shared_ptr<OpContext> context_of(const OpId& id);
  // Has each worker do its part of an operation.
  using Part = std::function<void(CpuWorker& worker, Job& job)>;
  Ticket start(const OpId& id, Part part, Execution execution);
  [[noreturn]] void raise_failed(OpContext& op);
  // Keeps the first that nobody has taken.
  void note_trouble(const Trouble& trouble);
  // A worker ran into an error of its own: the other workers and the other ranks need not wait for it.
  void abandon(OpContext& op, const std::exception_ptr& error);

  Ticket last_bounded_;  // the bounded dispatch issued last; guarded as epoch_ is
  const VectorOps* ops_;
  Throttle throttle_;
  Sequence sequence_{};
  std::shared_ptr<Region> region_;                // this rank's; loaded and stored whole, as slots_
  std::vector<std::shared_ptr<Region>> regions_;  // of this node
  std::shared_ptr<BufferPool> buffers_;
  std::mutex trouble_mutex_;  // guards trouble_, which workers set
  std::optional<Trouble> trouble_;
  std::unique_ptr<WorkerPool> pool_;
};

}  // namespace commlib
