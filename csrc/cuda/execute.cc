// How operations run on a GPU: as kernels, on the communicator's stream or beside it.
#include "cuda/capture.h"
#include "cuda/communicator.h"
#include "cuda/wait.h"

namespace commlib::cuda {

void CudaCommunicator::lend_scratch(PlanOp& op) const {
  op.routing.owner = owner_on_device_;
  op.expert_counts = scratch_.expert_counts;
  op.worker_counts = scratch_.warp_counts;
  op.group_rows = scratch_.group_rows;
  op.group_begins = scratch_.group_begins;
}

PlanReport CudaCommunicator::execute_plan(const OpId& id, PlanOp op) {
  const OnDevice guard = on_device();
  lend_scratch(op);
  launch_plan(plan_stream_, {params(id, 0), op, ++plans_});
  check(cudaEventRecord(planned_, plan_stream_), "cudaEventRecord");
  wait_for([&] { return load_word(&host_->planned) == plans_ || load_word(&host_->failed) != 0; });
  return host_->report;
}

void CudaCommunicator::plan_after_all() {
  if (plan_stream_ == shape_.stream) return;
  const OnDevice guard = on_device();
  check(cudaEventRecord(issued_, shape_.stream), "cudaEventRecord");
  check(cudaStreamWaitEvent(plan_stream_, issued_, 0), "cudaStreamWaitEvent");
}

// The stream orders what comes after, so a slot that is only passed through is free again.
Ticket CudaCommunicator::execute_rows(const OpId& id, const RowsOp& op, Execution execution) {
  const OnDevice guard = on_device();
  const bool captured = id.epoch == 0;
  if (captured) keep_with_graph(execution.lease, std::move(execution.held));
  RowsKernelOp kernel{params(id, shape_.ring_bytes), op};
  kernel.rows.waves_of_routes = scratch_.waves_of_routes;
  if (op.send.is_fresh() && !captured) {  // routes are placed last
    check(cudaStreamWaitEvent(shape_.stream, planned_, 0), "cudaStreamWaitEvent");
  }
  id.call.has(kCallInWaves) ? launch_waves(shape_, kernel) : launch_rows(shape_, kernel);
  return nullptr;
}

// The rows come behind the plan, on their stream. In a graph the plan is on that one, too: it takes its
// number from the operation before it, which must have ended.
Ticket CudaCommunicator::execute_bounded(const OpId& id, PlanOp plan, const RowsOp& op, Execution execution) {
  const OnDevice guard = on_device();
  lend_scratch(plan);
  const bool captured = id.epoch == 0;
  launch_bounded_plan(captured ? shape_.stream : plan_stream_, {params(id, 0), plan, 0});
  if (!captured) check(cudaEventRecord(planned_, plan_stream_), "cudaEventRecord");
  return execute_rows(id, op, std::move(execution));
}

std::optional<Trouble> CudaCommunicator::take_trouble() {
  if (load_word(&host_->troubled) == 0) return std::nullopt;
  const Trouble trouble = host_->trouble;
  store_word(&host_->troubled, 0);
  return trouble;
}

Ticket CudaCommunicator::execute_combine(const OpId& id, const CombineOp& op, Execution execution) {
  const OnDevice guard = on_device();
  if (id.epoch == 0) keep_with_graph(execution.lease, std::move(execution.held));
  launch_combine(shape_, op.pull.dtype, {params(id, shape_.ring_bytes), op});
  return nullptr;
}

void CudaCommunicator::await_pulls(Call call, const std::shared_ptr<SlotLease>& lease) {
  const OnDevice guard = on_device();
  if (is_captured()) keep_with_graph(lease, nullptr);
  launch_await(shape_.stream, {params({call, 0}, 0)});
}

uint64_t CudaCommunicator::capture_id() const { return capture_of(shape_.stream); }

// What an operation that is being captured uses. The slot is the graph's anyway, unless its rows had come, or
// were lent, before. A graph may outlive the communicator. Its kernels then read that they are to do nothing.
void CudaCommunicator::keep_with_graph(const std::shared_ptr<SlotLease>& lease, Held held) {
  const bool is_graphs = slots_->is_reserved(lease->index(), capture_id());
  struct Used {
    std::shared_ptr<SlotLease> lease;
    Held held;
    Memory memory, internode;
    std::shared_ptr<HostState> host;
    std::vector<std::shared_ptr<DeviceRegion>> regions;
  };
  cuda::keep_with_graph(shape_.stream,
                        std::make_shared<Used>(Used{is_graphs ? nullptr : lease, std::move(held), memory_,
                                                    internode_on_device_, host_, regions_}));
  has_graphs_ = true;
}

// The stream's front end waits, not an SM.
void CudaCommunicator::wait_expert(const PendingDispatch& dispatch, const Ticket&, int64_t expert,
                                   uintptr_t stream) {
  const OnDevice guard = on_device();
  const uint64_t* word = &state_->unpacked[wave_of_own(expert)];
  check(driver().stream_wait_value(reinterpret_cast<CUstream>(stream), reinterpret_cast<CUdeviceptr>(word),
                                   dispatch.id.epoch, CU_STREAM_WAIT_VALUE_GEQ),
        "cuStreamWaitValue64", "Without in_waves=True, wait_expert does without it.");
  awaiting_waves_->note(config_.device, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace commlib::cuda
