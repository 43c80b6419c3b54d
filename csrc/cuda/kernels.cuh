// The kernels of dispatch and combine. Every warp of the grid is a worker; all blocks are resident at once,
// one to an SM, so they may wait for each other and for other ranks.
//
// A warp whose wait failed goes on to the next grid barrier with ok = false: no thread leaves a barrier
// short.
#pragma once

#include "cuda/worker_rows.cuh"
#include "protocol/combine_hops.h"
#include "protocol/dispatch_hops.h"

namespace commlib::cuda {

// counts [workers][n] -> firsts [workers][n]: for each of n columns the exclusive prefix sum over workers, on
// top of base[column] (0 without). totals [n]: the sums, or null. Columns are dealt to `warps` warps.
__device__ inline void scan_workers(const uint32_t* counts, int64_t* firsts, int64_t n, int workers,
                                    const int64_t* base, uint32_t* totals, int warp, int warps) {
  const int lane = static_cast<int>(threadIdx.x % kWarpLanes);
  for (int64_t c = warp; c < n; c += warps) {
    int64_t sum = base ? base[c] : 0;
    const int64_t start = sum;
    for (int first = 0; first < workers; first += kWarpLanes) {
      const int w = first + lane;
      const uint32_t mine = w < workers ? counts[w * n + c] : 0;
      uint32_t before = mine;  // inclusive scan over lanes
      for (int step = 1; step < kWarpLanes; step *= 2) {
        const uint32_t below = __shfl_sync(kAllLanes, before, lane - step < 0 ? 0 : lane - step);
        if (lane >= step) before += below;
      }
      if (w < workers) firsts[w * n + c] = sum + before - mine;
      sum += __shfl_sync(kAllLanes, before, kWarpLanes - 1);
    }
    if (totals && lane == 0) totals[c] = static_cast<uint32_t>(sum - start);
  }
}

// -- plan: from expert ids to routes, and counts from rank to rank
// -------------------------------------------

// Warp 0 of block 0 tells and asks the other ranks. Returns what came out.
__device__ inline PlanStatus exchange_counts(WarpWorker& w, const PlanOp& op) {
  const OpParams& common = op.common;
  const SourceCounts counts{op.scratch.rank_totals, op.scratch.expert_counts};
  if (op.reused && !await_pulled(w, common.peers, op.reuse_epoch)) return PlanStatus::failed;
  publish_call(w, common.peers, common.wait.epoch, common.wait.call);
  publish_counts(w, common.peers, op.routing.placement, counts, op.dispatch);
  const CountsResult result{op.scratch.base, op.scratch.received, op.scratch.source_rows,
                            op.scratch.rows_per_expert};
  if (!collect_counts(w, common.peers, op.routing.placement, op.dispatch, result)) return PlanStatus::failed;
  if (!collect_calls(w, common.peers, common.wait.epoch, common.wait.call, op.scratch.slots))
    return PlanStatus::failed;
  int64_t least_room = op.capacity;
  for (int p = w.lane(); p < common.peers.size; p += w.lanes()) {
    const int64_t room = op.capacity - op.scratch.received[p];
    least_room = room < least_room ? room : least_room;
  }
  return w.lowest(least_room) < 0 ? PlanStatus::overflow : PlanStatus::placed;
}

// The least of the workers' bad indices; warp-wide.
__device__ inline int64_t first_bad_index(const WarpWorker& w, const PlanOp& op) {
  int64_t bad = kNoBadId;
  for (int i = w.lane(); i < w.count(); i += w.lanes()) {
    bad = op.scratch.bad[i] < bad ? op.scratch.bad[i] : bad;
  }
  return w.lowest(bad);
}

__device__ inline void report_overflow(const WarpWorker& w, const PlanOp& op) {
  HostState& host = *op.common.host;
  if (w.lane() != 0) return;
  host.fullest = 0;
  for (int p = 1; p < op.common.peers.size; ++p) {
    if (op.scratch.received[p] > op.scratch.received[host.fullest]) host.fullest = p;
  }
  host.fullest_rows = op.scratch.received[host.fullest];
}

// Hands the host what it waits for; warp-wide.
__device__ inline void report_plan(const WarpWorker& w, const PlanOp& op, PlanStatus status, int64_t bad,
                                   int rounds) {
  HostState& host = *op.common.host;
  if (status == PlanStatus::placed) {
    for (int p = w.lane(); p < op.common.peers.size; p += w.lanes()) {
      host.source_rows[p] = op.scratch.source_rows[p];
      host.slots[p] = op.scratch.slots[p];
    }
    const int64_t experts = op.routing.placement.count(op.common.peers.rank);
    for (int64_t e = w.lane(); e < experts; e += w.lanes()) {
      host.rows_per_expert[e] = op.scratch.rows_per_expert[e];
    }
  }
  if (status == PlanStatus::overflow) report_overflow(w, op);
  __syncwarp();
  if (w.lane() != 0) return;
  host.plan_status = status;
  host.rounds = rounds;
  host.dropped = op.common.state->dropped;
  host.bad_index = bad;
  host.bad_id = bad == kNoBadId ? 0 : op.routing.topk_idx[bad];
  ptx::store_release_sys(&host.planned, op.plan);
}

// Block 0: sums over workers, then counts from rank to rank.
__device__ inline PlanStatus plan_block_0(WarpWorker& w, const PlanOp& op) {
  scan_workers(op.scratch.rank_counts, op.scratch.rank_firsts, op.common.peers.size, w.count(), nullptr,
               op.scratch.rank_totals, w.warp(), kWarps);
  __syncthreads();
  if (w.warp() != 0) return PlanStatus::placed;
  const int64_t bad = first_bad_index(w, op);
  const PlanStatus status = bad != kNoBadId ? PlanStatus::bad_id : exchange_counts(w, op);
  const bool second_round = status == PlanStatus::overflow && op.drop;
  if (w.lane() == 0) {
    op.common.state->plan_status = status;
    op.common.state->dropped = 0;
  }
  if (!second_round) report_plan(w, op, status, bad, 1);
  return status;
}

// Rows past capacity go; everyone sees the same overflow in the counts, so all ranks take this second round.
__device__ inline void plan_second_round(WarpWorker& w, const PlanOp& op) {
  const SourceCounts counts{op.scratch.rank_totals, op.scratch.expert_counts};
  const int64_t dropped = drop_overflow(w, op.routing, op.routes, counts, op.capacity);
  if (dropped) w.tally(&op.common.state->dropped, static_cast<int>(dropped));
  if (!w.grid_barrier(true) || w.index() != 0) return;
  const CountsResult result{op.scratch.base, op.scratch.received, op.scratch.source_rows,
                            op.scratch.rows_per_expert};
  publish_counts(w, op.common.peers, op.routing.placement, counts, op.dispatch + 1);
  if (!collect_counts(w, op.common.peers, op.routing.placement, op.dispatch + 1, result)) return;
  report_plan(w, op, PlanStatus::placed, kNoBadId, 2);
}

__global__ void __launch_bounds__(kThreads, 1) plan_kernel(const __grid_constant__ PlanOp op) {
  WarpWorker w(op.common);
  const int ranks = op.common.peers.size;
  uint32_t* rank_counts = op.scratch.rank_counts + static_cast<int64_t>(w.index()) * ranks;
  int64_t* firsts = op.scratch.rank_firsts + static_cast<int64_t>(w.index()) * ranks;
  for (int p = w.lane(); p < ranks; p += w.lanes()) rank_counts[p] = 0;
  const int64_t experts = op.routing.placement.experts;
  for (int64_t e = w.index() * w.lanes() + w.lane(); e < experts; e += w.count() * w.lanes()) {
    op.scratch.expert_counts[e] = 0;
  }
  bool ok = w.grid_barrier(true);
  const int64_t bad = count_routes(w, op.routing, op.routes, {rank_counts, op.scratch.expert_counts});
  if (w.lane() == 0) op.scratch.bad[w.index()] = bad;
  ok = w.grid_barrier(ok);
  if (ok && blockIdx.x == 0) ok = plan_block_0(w, op) != PlanStatus::failed;
  if (!w.grid_barrier(ok)) return;
  const PlanStatus status = op.common.state->plan_status;
  // Where the host throws, routes may be gone.
  if (status == PlanStatus::bad_id || (status == PlanStatus::overflow && !op.drop)) return;
  for (int p = w.lane(); p < ranks; p += w.lanes()) firsts[p] += op.scratch.base[p];
  __syncwarp();
  place_routes(w, op.routing, op.routes, firsts);
  if (status != PlanStatus::overflow) return;
  w.grid_barrier(true);  // routes are written by lanes of one token each, and dropped by others
  plan_second_round(w, op);
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
  scan_workers(op.scratch.group_counts, op.scratch.group_firsts, experts, w.count(), op.deliver.offsets,
               nullptr, w.index(), w.count());
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

template <class Worker>
__global__ void __launch_bounds__(kThreads, 1) rows_kernel(const __grid_constant__ RowsOp op) {
  Worker w(op.common);
  SendPlan send = op.send;
  bool ok = true;
  if (!send.slots) {
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
    if (op.send.with_experts || op.deliver.out_weights) deliver_metadata(w, op.deliver);
  }
  w.flush();
}

// A fresh dispatch in waves. However it ends, nobody's stream waits for it after that.
__global__ void __launch_bounds__(kThreads, 1) waves_kernel(const __grid_constant__ WavesOp op) {
  const RowsOp& rows = op.rows;
  WarpWorker w(rows.common);
  const WavePlan plan{rows.scratch.waves_of_routes, op.early, rows.arrivals};
  const auto prepare = [&](bool ok) {
    if (!rows.places) return ok;  // no rows: no places
    if (!group(w, rows, ok)) return false;
    zero_padding(w, rows.deliver);
    deliver_metadata(w, rows.deliver);
    return true;
  };
  int delivered = 0;
  const auto deliver = [&](int wave) {
    if (w.lane() == 0) w.add(&rows.common.state->delivered[wave]);
    delivered = wave + 1;
  };
  move_in_waves(w, rows.send, rows.deliver, plan, rows.common.peers, prepare, deliver);
  while (delivered < kWaves) deliver(delivered);
}

// Nobody pulls any more from a slot that is about to be written by others than this library's kernels.
__global__ void __launch_bounds__(kThreads, 1) await_kernel(const __grid_constant__ AwaitOp op) {
  WarpWorker w(op.common);
  if (w.index() == 0) await_pulled(w, op.common.peers, op.reuse_epoch);
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
