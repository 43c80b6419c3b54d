// The kernels that move rows. Every warp of the grid is a worker; all blocks are resident at once, one to an
// SM, so they may wait for each other and for other ranks.
//
// A warp whose wait failed goes on to the next barrier of its block with ok = false: no barrier lacks a
// thread.
#pragma once

#include "cuda/convert.cuh"
#include "cuda/worker_rows.cuh"

namespace commlib::cuda {

// Rows of a dispatch, fresh or along a known routing.
template <class Worker>
__global__ void __launch_bounds__(kThreads, 1) rows_kernel(const __grid_constant__ RowsKernelOp op) {
  Worker w(op.common);
  if (w.begin(Does::move_rows)) run_rows(w, op.rows, op.common.peers, w.id());
}

// A fresh dispatch in waves. However it ends, no stream waits for it after that.
__global__ void __launch_bounds__(kThreads, 1) waves_kernel(const __grid_constant__ RowsKernelOp op) {
  const OpParams& common = op.common;
  WarpWorker w(common);
  int unpacked = 0;
  const auto count = [&](int wave) {
    DeviceState& state = *common.state;
    if (is_last(w, &state.unpacking[wave], 1, w.count()) && w.lane() == 0) {
      w.publish(&state.unpacked[wave], common.number);
    }
    unpacked = wave + 1;
  };
  if (w.begin(Does::move_rows)) run_waves(w, op.rows, common.peers, w.id(), count);
  w.flush();  // after a failure, copies may still read this block's shared memory, which another gets next
  while (unpacked < kWaves) count(unpacked);
}

// Waits until no rank pulls from a slot that is lent to the user. One warp.
__global__ void __launch_bounds__(kWarpLanes, 1) await_kernel(const __grid_constant__ AwaitKernelOp op) {
  WarpWorker w(op.common);
  if (w.begin(Does::wait)) await_slot(w, op.common.peers);
}

template <class T, class Worker>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ CombineKernelOp op) {
  SumWorker<T, Worker> w(op.common);
  // The call comes from the kernel's arguments: between nodes there is no register to spare.
  if (w.begin(Does::move_rows))
    run_combine(w, op.combine, op.common.peers, {op.common.call, w.id().epoch, op.common.format});
}

}  // namespace commlib::cuda
