// The kernels that move rows. Every warp of the grid is a worker; all blocks are resident at once, one to an
// SM, so they may wait for each other and for other ranks.
//
// A warp whose wait failed goes on to the next grid barrier with ok = false: no thread leaves a barrier
// short.
#pragma once

#include "cuda/worker_rows.cuh"
#include "protocol/combine_hops.h"
#include "protocol/dispatch_hops.h"

namespace commlib::cuda {

// counts [workers][n] -> firsts [workers][n]: for each of n columns the exclusive prefix sum over workers, on
// top of base[column]. Workers share the columns.
__device__ inline void scan_workers(const WarpWorker& w, const uint32_t* counts, int64_t* firsts, int64_t n,
                                    const int64_t* base) {
  for (int64_t c = w.index(); c < n; c += w.count()) {
    int64_t sum = base[c];
    for (int first = 0; first < w.count(); first += kWarpLanes) {
      const int row = first + w.lane();
      const Prefix here = w.prefix(row < w.count() ? counts[row * n + c] : 0);
      if (row < w.count()) firsts[row * n + c] = sum + here.before;
      sum += here.all;
    }
  }
}

// -- rows: dispatch, fresh or along a known routing
// ----------------------------------------------------------

// layout="expert": what grouped row each (unique row, place) becomes.
__device__ inline bool group(WarpWorker& w, const RowsOp& op, bool ok) {
  const int64_t experts = op.deliver.experts;
  const int32_t* of_rows = op.deliver.slot.experts;
  uint32_t* next = op.scratch.group_counts + w.index() * experts;
  const int64_t* first = op.scratch.group_firsts + w.index() * experts;
  for (int64_t e = w.lane(); e < experts; e += w.lanes()) next[e] = 0;
  __syncwarp();
  if (ok) group_rows(w, of_rows, op.deliver.rows, op.deliver.topk, next, op.places);
  if (!w.grid_barrier(ok)) return false;
  scan_workers(w, op.scratch.group_counts, op.scratch.group_firsts, experts, op.deliver.offsets);
  if (!w.grid_barrier(true)) return false;
  place_groups(w, of_rows, op.deliver.rows, op.deliver.topk, first, op.places);
  return w.grid_barrier(true);  // rows are copied by others than those who placed them
}

// Along a known routing nobody has heard of this call yet. A rank lends a slot only when nobody pulls from it
// any more.
__device__ inline void announce(WarpWorker& w, const RowsOp& op) {
  const OpParams& common = op.common;
  if (op.reused && !await_pulled(w, common.peers, op.reuse_epoch)) return;
  publish_call(w, common.peers, common.wait.epoch, common.wait.call);
}

// Of a fresh dispatch, the plan says what came from whom.
__device__ inline DeliverPlan deliver_of(const RowsOp& op) {
  DeliverPlan deliver = op.deliver;
  deliver.source_rows = op.fresh ? op.source_rows : nullptr;
  return deliver;
}

template <class Worker>
__global__ void __launch_bounds__(kThreads, 1) rows_kernel(const __grid_constant__ RowsOp op) {
  Worker w(op.common);
  SendPlan send = op.send;
  send.slots = op.slots;
  bool ok = true;
  if (!op.fresh) {
    ok = w.once([&] {
      if (w.index() == 0) announce(w, op);
      return collect_calls(w, op.common.peers, op.common.wait.epoch, op.common.wait.call, w.slots());
    });
    send.slots = w.slots();
  }
  ok = ok && move_rows(w, send, op.common.peers, op.common.wait, op.arrivals);
  if (op.places) ok = group(w, op, ok);
  if (ok) {
    if (op.deliver.out_rows) {
      replicate_rows(w, op.deliver);
      if (op.deliver.places) zero_padding(w, op.deliver);
    }
    if (op.send.with_experts || op.deliver.out_weights) deliver_metadata(w, deliver_of(op));
  }
  w.flush();
}

// A fresh dispatch in waves. However it ends, nobody's stream waits for it after that.
__global__ void __launch_bounds__(kThreads, 1) waves_kernel(const __grid_constant__ WavesOp op) {
  const RowsOp& rows = op.rows;
  WarpWorker w(rows.common);
  const WavePlan plan{rows.scratch.waves_of_routes, op.early, rows.arrivals};
  SendPlan send = rows.send;
  send.slots = rows.slots;
  const auto prepare = [&](bool ok) {
    if (!rows.places) return ok;  // no rows: no places
    if (!group(w, rows, ok)) return false;
    zero_padding(w, rows.deliver);
    deliver_metadata(w, deliver_of(rows));
    return true;
  };
  int delivered = 0;
  const auto deliver = [&](int wave) {
    if (w.lane() == 0) w.add(&rows.common.state->delivered[wave]);
    delivered = wave + 1;
  };
  move_in_waves(w, send, rows.deliver, plan, rows.common.peers, prepare, deliver);
  w.flush();  // after a failure, copies may still read this block's shared memory, which is another's next
  while (delivered < kWaves) deliver(delivered);
}

// Nobody pulls any more from a slot that is about to be lent. One warp; plan.cuh says why it finds an end.
__global__ void __launch_bounds__(kWarpLanes, 1) await_kernel(const __grid_constant__ AwaitOp op) {
  WarpWorker w(op.common);
  await_pulled(w, op.common.peers, op.reuse_epoch);
}

// -- combine
// -------------------------------------------------------------------------------------------------

template <class T, class Worker>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ CombineOp op) {
  SumWorker<T, Worker> w(op.common);
  const OpParams& common = op.common;
  bool ok = !op.reused || w.once([&] { return await_pulled(w, common.peers, op.reuse_epoch); });
  PullPlan pull = op.pull;
  pull.slots = w.slots();
  if (ok) {
    if (w.index() == 0) publish_call(w, common.peers, common.wait.epoch, common.wait.call);
    start_pull(w, pull, common.peers, common.wait);
    stage_rows(w, op.stage, rows_not_staged(w, op.pull, common.peers.rank));
    arrive(w, common.peers);
    ok = w.once([&] {
      return collect_calls(w, common.peers, common.wait.epoch, common.wait.call, w.slots()) &&
             await_arrivals(w, common.peers, op.arrivals);
    });
  }
  ok = ok && pull_all(w, pull, common.peers, common.wait);
  w.flush();
  ok = w.grid_barrier(ok);
  if (!ok || w.index() != 0) return;
  publish_pulled(w, common.peers, common.wait.epoch);
  // Rows of a receive slot are the user's tensor, who may write it when this kernel is done.
  if (op.users_rows) await_pulled(w, common.peers, common.wait.epoch);
}

}  // namespace commlib::cuda
