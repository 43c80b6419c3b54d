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
  void connect(const std::vector<PeerAddress>& peers) override;
  std::unique_ptr<PendingDispatch> begin_dispatch(const RoutingView& routing, bool has_weights, bool drop,
                                                  bool in_waves) override;
  Ticket finish_dispatch(PendingDispatch& pending, const Rows& rows, const RoutingView& routing,
                         const Received& received, bool async) override;
  Ticket redispatch(const Rows& rows, const RoutingView& routing, const Received& received, bool async,
                    std::shared_ptr<SlotLease>* lease) override;
  Ticket combine(const CombineInput& input, const RoutingView& routing, std::byte* out,
                 std::byte* out_weights, bool async) override;
  void wait(const Ticket& ticket) override { pool_->wait(*ticket); }
  void wait_expert(const PendingDispatch& dispatch, const Ticket& ticket, int64_t expert,
                   uintptr_t stream) override;
  void synchronize() override;
  std::shared_ptr<SlotLease> lend_slot() override;
  int64_t touched_bytes() const override { return static_cast<int64_t>(region_->touched_bytes()); }

  std::shared_ptr<BufferPool> buffers() const { return buffers_; }
  const char* vector_ops_name() const { return ops_->name; }

  // For benchmarks: one worker's send_rows or pull_rows and nothing else, over the routing of a dispatch
  // whose slots are not in use. The machine's own limit for this routing and these stores.
  void bare_send(const Rows& rows, const RoutingView& routing);
  void bare_pull(const RoutingView& routing, std::byte* out);

 private:
  struct Transfer;

  void drain() override { pool_->drain(); }
  void tell_all(const Farewell& left) override;

  std::shared_ptr<OpContext> context(Call call, uint32_t epoch) const;
  std::shared_ptr<SlotLease> take_writable_slot(Call call);
  void await_writable(const SlotLease& lease, Call call);
  uint32_t announce(Call call);
  Ticket start(std::shared_ptr<Job> job, bool async);
  Ticket start_transfer(std::shared_ptr<Transfer> transfer, bool async);
  void run_transfer(Transfer& t, int index);
  void run_in_waves(Transfer& t, Job& job, int index);
  [[noreturn]] void raise_failed(OpContext& op);
  // A worker ran into an error of its own: its fellows and the other ranks need not wait for it.
  void abandon(OpContext& op, const std::exception_ptr& error);

  const VectorOps* ops_;
  mutable Link link_;
  std::shared_ptr<Region> region_;                // this rank's
  std::vector<std::shared_ptr<Region>> regions_;  // by rank
  std::unique_ptr<PeerProcesses> processes_;
  std::shared_ptr<BufferPool> buffers_;
  std::unique_ptr<WorkerPool> pool_;
};

}  // namespace commlib
