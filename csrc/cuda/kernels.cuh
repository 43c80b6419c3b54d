// The kernels that move rows. Every warp of the grid is a worker; all blocks are resident at once, one to an
// SM, so they may wait for each other and for other ranks.
//
// A warp whose wait failed goes on to the next barrier of its block with ok = false: no barrier lacks a
// thread.
#pragma once

#include "cuda/worker_rows.cuh"
#include "protocol/operations.h"

namespace commlib::cuda {

// -- rows: dispatch, fresh or along a known routing
// ----------------------------------------------------------

// Along a known routing no other rank has heard of this call yet. A rank lends a slot only when no rank pulls
// from it any more.
__device__ inline void announce(WarpWorker& w, const RowsOp& op) {
  const OpParams& common = op.common;
  if (!await_pulled(w, common.peers, op.last_pull)) return;
  publish_call(w, common.peers, common.id);
}

// In a fresh dispatch, the plan says what came from which rank.
__device__ inline UnpackPlan unpack_plan_of(const RowsOp& op) {
  UnpackPlan unpack = op.unpack;
  unpack.source_rows = op.send.is_fresh() ? op.source_rows : nullptr;
  return unpack;
}

template <class Worker>
__global__ void __launch_bounds__(kThreads, 1) rows_kernel(const __grid_constant__ RowsOp op) {
  Worker w(op.common);
  SendPlan send = op.send;
  if (send.is_fresh()) {
    send.slots = op.slots;
  } else if (w.index() == 0) {
    announce(w, op);
  }
  run_dispatch(w, send, unpack_plan_of(op), op.common.peers, op.common.id);
}

// A fresh dispatch in waves. However it ends, no stream waits for it after that.
__global__ void __launch_bounds__(kThreads, 1) waves_kernel(const __grid_constant__ WavesOp op) {
  const RowsOp& rows = op.rows;
  WarpWorker w(rows.common);
  SendPlan send = rows.send;
  send.slots = rows.slots;
  int unpacked = 0;
  const auto count = [&](int wave) {
    DeviceState& state = *rows.common.state;
    if (is_last(w, &state.unpacking[wave], 1, w.count()) && w.lane() == 0) {
      w.publish(&state.unpacked[wave], rows.common.id.epoch);
    }
    unpacked = wave + 1;
  };
  move_in_waves(w, send, unpack_plan_of(rows), op.waves_of_routes, rows.common.peers, rows.common.id.epoch,
                count);
  w.flush();  // after a failure, copies may still read this block's shared memory, which another gets next
  while (unpacked < kWaves) count(unpacked);
}

// Waits until no rank pulls from a slot that is about to be lent. One warp; plan.cuh says why it ends.
__global__ void __launch_bounds__(kWarpLanes, 1) await_kernel(const __grid_constant__ AwaitOp op) {
  WarpWorker w(op.common);
  await_pulled(w, op.common.peers, op.last_pull);
}

// -- combine
// -------------------------------------------------------------------------------------------------

template <class T, class Worker>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ CombineOp op) {
  SumWorker<T, Worker> w(op.common);
  const OpParams& common = op.common;
  const bool ok = op.last_pull == 0 || w.once([&] { return await_pulled(w, common.peers, op.last_pull); });
  if (ok && w.index() == 0) publish_call(w, common.peers, common.id);
  run_combine(w, op.local_sum, op.pull, common.peers, common.id, op.users_rows, ok);
}

}  // namespace commlib::cuda
