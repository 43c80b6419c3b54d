// The kernel of a plan.
//
// One block, which needs no grid barrier. Plans run on a stream of their own, beside the rows of earlier
// dispatches, where the ranks of this process together have one SM more for each rank than they have blocks
// that move rows. So no ranks wait in a circle: a rank has one plan under way at a time, on one SM; whatever
// it waits for, rows of all ranks find the SMs they need and end. The slots are then free, so all plans come,
// and wait only for each other's words.
#pragma once

#include "cuda/worker.cuh"

namespace commlib::cuda {

using BlockPlan = PlanShared<kPlanWarps>;

// How many would fit an SM by their registers: a block finds room beside one that moves rows, which takes up
// to 96 registers a thread in most kernels of sm_90, or beside those of compute.
constexpr int kPlanBlocks = 4;
// After the warps' own parts.
constexpr int kPlanSharedBegin = kBlockSharedBytes + kPlanWarps * WarpShared::bytes(0);
constexpr int kPlanSharedBytes = kPlanSharedBegin + static_cast<int>(sizeof(BlockPlan));

// The host goes on once it knows the sizes; where it throws, what rows are placed in may be gone.
template <class Worker>
__device__ void plan(const PlanKernelOp& op) {
  const OpParams& common = op.common;
  Worker w(common);
  BlockPlan& shared = *reinterpret_cast<BlockPlan*>(ptx::dynamic_shared() + kPlanSharedBegin);
  if (!w.begin(Does::plan)) return;
  run_plan(w, op.plan, common.peers, shared, [&](PlanStatus status) {
    report_plan(w, op.plan, common.peers, shared, status, common.host->report);
    if (w.lane() != 0) return;
    if (status == PlanStatus::overflow) common.state->sequence.refused = w.id().epoch;
    ptx::store_release_sys(&common.host->planned, op.number);
  });
}

__global__ void __launch_bounds__(kPlanWarps* kWarpLanes, kPlanBlocks)
    plan_kernel(const __grid_constant__ PlanKernelOp op) {
  plan<WarpWorker>(op);
}

// Of groups. It finds room beside compute, not beside rows.
__global__ void __launch_bounds__(kPlanWarps* kWarpLanes, kPlanBlocks / 2)
    group_plan_kernel(const __grid_constant__ PlanKernelOp op) {
  plan<GroupPlanWorker>(op);
}

// Of a bounded dispatch: the host waits for nothing.
__global__ void __launch_bounds__(kPlanWarps* kWarpLanes, kPlanBlocks)
    bounded_plan_kernel(const __grid_constant__ PlanKernelOp op) {
  BoundedPlanWorker w(op.common);
  BlockPlan& shared = *reinterpret_cast<BlockPlan*>(ptx::dynamic_shared() + kPlanSharedBegin);
  if (!w.begin(Does::plan)) return;
  run_bounded_plan(w, op.plan, op.common.peers, shared, [&](const Trouble& trouble) {
    HostState& host = *op.common.host;
    if (w.lane() != 0 || ptx::load_acquire_sys(&host.troubled) != 0) return;
    host.trouble = trouble;
    ptx::store_release_sys(&host.troubled, 1);
  });
}

}  // namespace commlib::cuda
