// A rank on a CUDA GPU: its heap in device memory, its kernels on one stream.
//
// Operations run in the order of the stream, on `num_sms` blocks each. Plans have a stream of their own where
// they find room beside them. The host waits in begin_dispatch, for sizes, and nowhere else. The caller
// orders the streams after the work that produced the inputs, and later work after the stream of operations.
#pragma once

#include <functional>

#include "backend/communicator.h"
#include "cuda/device_heap.h"
#include "cuda/driver.h"
#include "cuda/launch.h"
#include "cuda/pool.h"
#include "cuda/slots.h"
#include "cuda/watcher.h"
#include "heap/peer_processes.h"

namespace commlib::cuda {

class CudaCommunicator final : public Communicator {
 public:
  explicit CudaCommunicator(const Config& config);  // makes this rank's heap
  ~CudaCommunicator() override;

  PeerAddress address() override;
  void wait(const Ticket&) override { synchronize(); }
  void wait_expert(const PendingDispatch& dispatch, const Ticket& ticket, int64_t expert,
                   uintptr_t stream) override;
  void wait_event(uintptr_t event) override;
  void synchronize() override;
  void check_health() override;
  bool is_usable() const override;
  void set_timeout(double seconds) override;
  int64_t touched_bytes() override { return static_cast<int64_t>(region_->bytes()); }
  uintptr_t plan_stream() const override { return reinterpret_cast<uintptr_t>(plan_stream_); }
  // What the kernels have reported to the host so far, for looking into one that hangs.
  const HostState& host_state() const { return *host_; }

 private:
  PlanReport execute_plan(const OpId& id, PlanOp op) override;
  Ticket execute_rows(const OpId& id, const RowsOp& op, Execution execution) override;
  Ticket execute_bounded(const OpId& id, PlanOp plan, const RowsOp& rows, Execution execution) override;
  Ticket execute_combine(const OpId& id, const CombineOp& op, Execution execution) override;
  std::optional<Trouble> take_trouble() override;
  void await_pulls(Call call, const std::shared_ptr<SlotLease>& lease) override;
  uint64_t capture_id() const override;

  void drain() override;
  void drain_unless_interrupted() override;
  void end_waits() override { abort_waits(Cause::broken, config_.rank); }
  std::byte* map_heap(int rank, const PeerAddress& address) override;
  void has_connected() override;
  void announce_departure(const Departure& departure) override;
  Departure departure_of(int rank) override;
  void prepare_slot(SlotLease& lease) override;
  void has_closed() override;

  void make_scratch();
  void lend_scratch(PlanOp& op) const;
  void keep_what_others_use();
  void put(void* to, const void* from, size_t bytes);
  // ring_bytes: 0 for a kernel that copies no rows.
  OpParams params(const OpId& id, int ring_bytes) const;
  // Waits on the host until `done` says so, watching for Ctrl-C and for the death of other ranks. wait_for:
  // then throws if an operation has failed, or the communicator is closed.
  void wait_until(const std::function<bool()>& done);
  void wait_for(const std::function<bool()>& done);
  bool is_idle() const;
  void plan_after_all() override;
  void plan_after_plans() override {}                     // the stream of plans sees to that
  void collect_slots() override { drop_what_is_done(); }  // of graphs
  void keep_with_graph(const std::shared_ptr<SlotLease>& lease, Held held);
  void abort_waits(Cause cause, int peer);
  void check_processes();
  void check_peers();

  OnDevice on_device() const { return OnDevice(config_.device); }

  LaunchShape shape_;
  cudaStream_t plan_stream_ = nullptr;
  cudaEvent_t planned_ = nullptr;         // recorded after each plan
  cudaEvent_t issued_ = nullptr;          // recorded after operations that the next plan comes after
  std::shared_ptr<DeviceRegion> region_;  // this rank's
  std::vector<std::shared_ptr<DeviceRegion>> regions_;  // of this node
  std::vector<int> visitors_;                           // ranks of other processes that map region_
  Memory memory_;                                       // owner table, state and scratch
  Memory internode_on_device_;
  std::shared_ptr<HostState> host_;
  HostState* host_on_device_ = nullptr;
  DeviceState* state_ = nullptr;
  const uint8_t* owner_on_device_ = nullptr;
  uint64_t plans_ = 0;       // launched
  bool has_graphs_ = false;  // with operations of this communicator
  // Device memory that is used only within a kernel. A plan may run beside the rows of earlier dispatches, so
  // they share none of it, and what rows need from their plan comes in their arguments.
  struct Scratch {
    uint32_t* expert_counts;   // of plans: [experts]
    uint32_t* warp_counts;     // of plans: [kPlanWarps][experts]
    uint32_t* group_rows;      // of plans: [experts]
    uint32_t* group_begins;    // of plans: [experts]
    uint8_t* waves_of_routes;  // of rows: [max_tokens][width]
  } scratch_{};
  const std::shared_ptr<StreamUses> awaiting_waves_;  // streams that wait for words of state_
  std::unique_ptr<SharedDevice> shared_device_;
  std::vector<Departure> departures_;  // by rank, as far as anyone has looked; guarded by look_mutex_
  std::mutex look_mutex_;
  Stream aside_;                  // for words to other ranks while kernels run
  std::unique_ptr<Watch> watch_;  // last: it uses the others
};

}  // namespace commlib::cuda
