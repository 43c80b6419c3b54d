// dispatch, dispatch with a handle, and combine on a GPU: what each kernel is given, and what the host waits
// for.
#include <algorithm>

#include "cuda/communicator.h"
#include "cuda/wait.h"

namespace commlib::cuda {

std::unique_ptr<PendingDispatch> CudaCommunicator::begin_dispatch(const RoutePlan& routing, bool has_weights,
                                                                  bool drop, bool in_waves) {
  const Issue issue(*this);
  const OnDevice guard = on_device();
  check_health();
  auto pending = std::make_unique<PendingDispatch>();
  Call call = dispatch_call(has_weights, drop, in_waves);
  pending->lease = take_slot();
  call.slot = static_cast<uint8_t>(pending->lease->index());
  pending->call = call;
  pending->epoch = ++epoch_;

  keep_near();
  await_writable(*pending->lease, call, pending->epoch, plan_stream_);
  PlanOp op{};
  op.common = params(call, pending->epoch);
  op.common.ring_bytes = 0;
  op.routing = router_output_of(routing, owner_on_device_);
  op.routes = routing.routes;
  op.ordinals = pending->lease->slot().sent_ordinals;
  op.group_firsts = pending->lease->slot().group_firsts;
  op.rows_per_expert = routing.rows_per_expert;
  op.offsets = routing.offsets;
  op.align = routing.align;
  op.scratch = scratch_;
  op.plan = ++plans_;
  op.dispatch = dispatches_ + 1;
  op.capacity = config_.capacity;
  op.drop = drop;
  launch_plan(plan_stream_, op);
  check(cudaEventRecord(planned_, plan_stream_), "cudaEventRecord");
  wait_for([&] { return load_word(&host_->planned) == plans_ || load_word(&host_->failed) != 0; });

  if (host_->plan_status == PlanStatus::bad_id) {
    --epoch_;  // no rank has heard of it
    raise_bad_id(host_->bad_index, host_->bad_id);
  }
  dispatches_ += static_cast<uint32_t>(host_->rounds);
  if (host_->plan_status == PlanStatus::overflow) raise_overflow(host_->fullest, host_->fullest_rows);
  pending->source_rows.assign(host_->source_rows, host_->source_rows + config_.size);
  pending->slots.assign(host_->slots, host_->slots + config_.size);
  for (const int64_t n : pending->source_rows) pending->rows += n;
  pending->results = routing.offsets ? host_->grouped_rows : pending->rows;
  pending->dropped = host_->dropped;
  begin_turn(*pending);
  return pending;
}

// A plan that runs before operations issued earlier publishes its call before theirs. That call may be at
// most a ring of calls ahead, so now and then a plan comes after all of them.
void CudaCommunicator::keep_near() {
  constexpr uint64_t kAhead = kCallRing / 2;
  if (plan_stream_ == shape_.stream || epoch_ - near_epoch_ < kAhead) return;
  near_epoch_ = epoch_;
  check(cudaEventRecord(issued_, shape_.stream), "cudaEventRecord");
  check(cudaStreamWaitEvent(plan_stream_, issued_, 0), "cudaStreamWaitEvent");
}

// When what comes next in the stream begins, no rank pulls from the slot any more.
void CudaCommunicator::await_writable(const SlotLease& lease, Call call, uint64_t epoch,
                                      cudaStream_t stream) {
  AwaitOp op{};
  op.last_pull = lease.last_pull();
  if (op.last_pull == 0) return;
  op.common = params(call, epoch);
  op.common.ring_bytes = 0;
  launch_await(stream, op);
}

RowsOp CudaCommunicator::rows_op(Call call, uint64_t epoch, const Rows& rows, const RoutePlan& routing,
                                 const Received& received, const SlotLease& lease) {
  RowsOp op{};
  op.common = params(call, epoch);
  op.send = send_plan(rows, routing);
  op.unpack = unpack_plan(routing, received, lease);
  return op;
}

Ticket CudaCommunicator::finish_dispatch(PendingDispatch& pending, const Rows& rows, const RoutePlan& routing,
                                         const Received& received, bool, Held) {
  const Issue issue(*this, Issue::Of::pending_dispatch);
  const OnDevice guard = on_device();
  RowsOp op = rows_op(pending.call, pending.epoch, rows, routing, received, *pending.lease);
  op.send.ordinals = pending.lease->slot().sent_ordinals;
  std::copy(pending.slots.begin(), pending.slots.end(), op.slots);
  std::copy(pending.source_rows.begin(), pending.source_rows.end(), op.source_rows);
  check(cudaStreamWaitEvent(shape_.stream, planned_, 0), "cudaStreamWaitEvent");  // routes are placed last
  if (pending.in_waves()) {
    launch_waves(shape_, {op, scratch_.waves_of_routes});
  } else {
    launch_rows(shape_, op);
  }
  // The stream orders what comes after, so a slot that is only passed through is free again.
  if (!received.rows_in_slot) pending.lease.reset();
  end_turn(pending);
  return nullptr;
}

// The stream's front end waits, not an SM.
void CudaCommunicator::wait_expert(const PendingDispatch& dispatch, const Ticket&, int64_t expert,
                                   uintptr_t stream) {
  const OnDevice guard = on_device();
  const uint64_t* word = &state_->unpacked[wave_of(expert, placement_.count(config_.rank))];
  check(driver().stream_wait_value(reinterpret_cast<CUstream>(stream), reinterpret_cast<CUdeviceptr>(word),
                                   dispatch.epoch, CU_STREAM_WAIT_VALUE_GEQ),
        "cuStreamWaitValue64", "Without in_waves=True, wait_expert does without it.");
  awaiting_waves_->note(config_.device, reinterpret_cast<cudaStream_t>(stream));
}

Ticket CudaCommunicator::redispatch(const Rows& rows, const RoutePlan& routing, const Received& received,
                                    bool, std::shared_ptr<SlotLease>* lease, Held) {
  const Issue issue(*this);
  const OnDevice guard = on_device();
  check_health();
  Call call = redispatch_call(rows);
  auto slot = take_slot();
  call.slot = static_cast<uint8_t>(slot->index());
  RowsOp op = rows_op(call, ++epoch_, rows, routing, received, *slot);
  op.last_pull = slot->last_pull();
  launch_rows(shape_, op);
  if (received.rows_in_slot) *lease = std::move(slot);
  return nullptr;
}

Ticket CudaCommunicator::combine(const CombineInput& input, const RoutePlan& routing, std::byte* out,
                                 std::byte* out_weights, bool, Held) {
  const Issue issue(*this);
  const OnDevice guard = on_device();
  check_health();
  check_out(out);
  Call call = combine_call(input);
  const CombineSlot slot = combine_slot(input, routing);
  call.slot = static_cast<uint8_t>(slot.lease->index());
  CombineOp op{};
  op.common = params(call, ++epoch_);
  op.local_sum = local_sum_plan(input, routing, slot);
  op.pull = pull_plan(input, routing, op.local_sum, out, out_weights);
  op.users_rows = slot.users_rows;
  if (!slot.in_place) op.last_pull = slot.lease->last_pull();
  launch_combine(shape_, config_.dtype, op);
  slot.lease->pulled_in(epoch_);
  return nullptr;
}

std::shared_ptr<SlotLease> CudaCommunicator::lend_slot() {
  const Issue issue(*this);
  const OnDevice guard = on_device();
  check_health();
  auto lease = take_slot();
  await_writable(*lease, {OpKind::combine, 0, 0}, epoch_, shape_.stream);
  lease->lend();
  return lease;
}

}  // namespace commlib::cuda
