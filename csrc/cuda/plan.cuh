// The kernel of a plan: from expert ids to routes, and counts from rank to rank.
//
// One block, which needs no grid barrier. Plans run on a stream of their own, beside the rows of earlier
// dispatches, where the ranks of this process together have one SM more for each rank than they have blocks
// that move rows. So no ranks wait in a circle: a rank has one plan under way at a time, or one warp that
// waits for a slot before it, on one SM; whatever these wait for, rows of all ranks find the SMs they need
// and end. The slots are then free, so all plans come, and wait only for each other's words.
#pragma once

#include "cuda/worker.cuh"
#include "protocol/combine.h"
#include "protocol/counts.h"
#include "protocol/notify.h"
#include "protocol/unpack.h"

namespace commlib::cuda {

// What the warps of a plan tell each other, with __syncthreads in between.
struct PlanShared {
  uint32_t rank_counts[kPlanWarps][kMaxRanks];  // rows of each warp's tokens
  int64_t firsts[kPlanWarps][kMaxRanks];        // the first of them: of all warps' rows, then at each rank
  uint32_t rank_totals[kMaxRanks];
  int64_t base[kMaxRanks], received[kMaxRanks], source_rows[kMaxRanks];
  int64_t bad[kPlanWarps];
  uint32_t dropped;
  uint8_t ok[kPlanWarps];
  uint8_t slots[kMaxRanks];

  // After the warps' own parts.
  __host__ __device__ static constexpr int begin() {
    return kBlockSharedBytes + kPlanWarps * WarpShared::bytes(0);
  }
  __device__ static PlanShared& here() {
    return *reinterpret_cast<PlanShared*>(ptx::dynamic_shared() + begin());
  }
};
// How many would fit an SM by their registers: a block finds room beside one that moves rows, which takes up
// to 96 registers a thread in most kernels of sm_90, or beside those of compute.
constexpr int kPlanBlocks = 4;
constexpr int kPlanSharedBytes = PlanShared::begin() + static_cast<int>(sizeof(PlanShared));

__device__ inline CountsResult counts_result(const PlanOp& op, PlanShared& s) {
  return {s.base, s.received, s.source_rows, op.rows_per_expert, op.group_firsts};
}
__device__ inline SourceCounts source_counts(const PlanOp& op, PlanShared& s) {
  return {s.rank_totals, op.scratch.expert_counts};
}

// Whether all warps of the block say so.
__device__ inline bool all_warps(const WarpWorker& w, PlanShared& s, bool ok) {
  if (w.lane() == 0) s.ok[w.warp()] = ok;
  __syncthreads();
  for (const uint8_t warp : s.ok) ok = ok && warp;
  __syncthreads();  // no thread comes back and overwrites it before all have read it
  return ok;
}

// Counts of `items` by warp -> their sum, and that of all warps before each. Threads share the items.
template <class Before>
__device__ inline void sum_over_warps(const uint32_t* counts, Before* firsts, uint32_t* totals, int64_t items,
                                      int64_t stride) {
  for (int64_t i = threadIdx.x; i < items; i += kPlanWarps * kWarpLanes) {
    uint32_t seen[kPlanWarps], sum = 0;
#pragma unroll
    for (int warp = 0; warp < kPlanWarps; ++warp) seen[warp] = counts[warp * stride + i];
#pragma unroll
    for (int warp = 0; warp < kPlanWarps; ++warp) {
      firsts[warp * stride + i] = sum;
      sum += seen[warp];
    }
    totals[i] = sum;
  }
}

__device__ inline uint32_t* expert_counts_of_warp(const PlanOp& op, int warp) {
  return op.scratch.warp_counts + warp * op.routing.placement.experts;
}

// Every warp counts its part of the tokens; the sums over warps are then its first row of each rank and of
// each expert.
__device__ inline void count_tokens(WarpWorker& w, const PlanOp& op, PlanShared& s) {
  const int ranks = op.common.peers.size;
  const int64_t experts = op.routing.placement.experts;
  uint32_t* mine = expert_counts_of_warp(op, w.warp());
  for (int p = w.lane(); p < ranks; p += w.lanes()) s.rank_counts[w.warp()][p] = 0;
  for (int64_t e = w.lane(); e < experts; e += w.lanes()) mine[e] = 0;
  if (threadIdx.x == 0) s.dropped = 0;
  __syncwarp();
  const int64_t bad = count_routes(w, op.routing, op.routes, {s.rank_counts[w.warp()], mine});
  if (w.lane() == 0) s.bad[w.warp()] = bad;
  __syncthreads();
  sum_over_warps(s.rank_counts[0], s.firsts[0], s.rank_totals, ranks, kMaxRanks);
  uint32_t* of_warps = op.scratch.warp_counts;
  sum_over_warps(of_warps, of_warps, op.scratch.expert_counts, experts, experts);
  __syncthreads();
}

__device__ inline int64_t first_bad_index(const PlanShared& s) {
  int64_t least = kNoBadId;
  for (const int64_t bad : s.bad) least = bad < least ? bad : least;
  return least;
}

// Publishes this rank's counts and reads the others'; the last warp, which has few words to sum, reads every
// rank's call.
__device__ inline bool exchange_counts(WarpWorker& w, const PlanOp& op, PlanShared& s, int round) {
  const OpParams& common = op.common;
  const uint32_t dispatch = op.dispatch + static_cast<uint32_t>(round) - 1;
  if (round == 1 && w.warp() == 0) publish_call(w, common.peers, common.id);
  publish_counts(w, common.peers, op.routing.placement, source_counts(op, s), dispatch);
  bool ok = collect_counts(w, common.peers, op.routing.placement, dispatch, counts_result(op, s));
  if (round == 1 && w.warp() == kPlanWarps - 1) {
    ok = ok && collect_calls(w, common.peers, common.id, s.slots);
  }
  return all_warps(w, s, ok);
}

__device__ inline int fullest_rank(const PlanOp& op, const PlanShared& s) {
  int fullest = 0;
  for (int p = 1; p < op.common.peers.size; ++p) {
    if (s.received[p] > s.received[fullest]) fullest = p;
  }
  return fullest;
}

// Hands the host what it waits for. Called by warp 0.
__device__ inline void report_plan(WarpWorker& w, const PlanOp& op, PlanShared& s, PlanStatus status,
                                   int rounds) {
  HostState& host = *op.common.host;
  if (status == PlanStatus::placed) {
    for (int p = w.lane(); p < op.common.peers.size; p += w.lanes()) {
      host.source_rows[p] = s.source_rows[p];
      host.slots[p] = s.slots[p];
    }
    const int64_t experts = op.routing.placement.count(op.common.peers.rank);
    int64_t grouped = 0;
    if (op.offsets) grouped = group_offsets(w, op.rows_per_expert, experts, op.align, op.offsets);
    if (w.lane() == 0) host.grouped_rows = grouped;
  }
  __syncwarp();
  if (w.lane() != 0) return;
  const int64_t bad = first_bad_index(s);
  host.plan_status = status;
  host.rounds = rounds;
  host.dropped = s.dropped;
  host.bad_index = bad;
  host.bad_id = bad == kNoBadId ? 0 : op.routing.topk_idx[bad];
  host.fullest = fullest_rank(op, s);
  host.fullest_rows = s.received[host.fullest];
  ptx::store_release_sys(&host.planned, op.plan);
}

// Turns ordinals into rows, and numbers each row among those of its expert.
__device__ inline void place(WarpWorker& w, const PlanOp& op, PlanShared& s) {
  for (int p = w.lane(); p < op.common.peers.size; p += w.lanes()) s.firsts[w.warp()][p] += s.base[p];
  __syncwarp();
  place_routes(w, op.routing, op.routes, s.firsts[w.warp()]);
  number_rows_of_experts(w, op.routing, op.ordinals, expert_counts_of_warp(op, w.warp()));
}

// Drops the rows past capacity.
__device__ inline void drop(WarpWorker& w, const PlanOp& op, PlanShared& s) {
  __syncthreads();  // routes are written by lanes of one token each, and dropped by others
  const int64_t dropped = drop_overflow(w, op.routing, op.routes, source_counts(op, s), op.capacity);
  if (dropped) w.add_relaxed(&s.dropped, static_cast<int>(dropped));
  __syncthreads();
}

// Rows are placed once the host knows the sizes, and goes on; where it throws, they may be gone. Where rows
// are dropped, all ranks see the same overflow in the counts, so all take a second round.
__global__ void __launch_bounds__(kPlanWarps* kWarpLanes, kPlanBlocks)
    plan_kernel(const __grid_constant__ PlanOp op) {
  WarpWorker w(op.common);
  PlanShared& s = PlanShared::here();
  count_tokens(w, op, s);
  if (first_bad_index(s) != kNoBadId) {
    if (w.warp() == 0) report_plan(w, op, s, PlanStatus::bad_id, 1);
    return;
  }
#pragma unroll 1
  for (int round = 1;; ++round) {
    if (!exchange_counts(w, op, s, round)) return;
    const bool overflow = round == 1 && s.received[fullest_rank(op, s)] > op.capacity;
    const bool again = overflow && op.drop;
    if (!again && w.warp() == 0) {
      report_plan(w, op, s, overflow ? PlanStatus::overflow : PlanStatus::placed, round);
    }
    if (overflow && !again) return;
    if (round == 1) place(w, op, s);
    if (!again) return;
    drop(w, op, s);
  }
}

}  // namespace commlib::cuda
