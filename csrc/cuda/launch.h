// Kernels as host functions: the one place where they are launched. See kernels.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/state.h"

namespace commlib::cuda {

// The shape of every launch of a communicator: `blocks` blocks, each with enough shared memory that an SM has
// room for only one.
struct LaunchShape {
  int blocks;
  int shared_bytes;
  int ring_bytes;  // of each warp's part, for OpParams
  cudaStream_t stream;
};

// Prepares all kernels on the current device and loads them now: a kernel loaded on its first launch may have
// to wait for running ones, which may wait for it. Throws where `blocks` cannot all be resident.
LaunchShape prepare_kernels(int device, int blocks, cudaStream_t stream);

void launch_plan(cudaStream_t stream, const PlanKernelOp& op);
void launch_bounded_plan(cudaStream_t stream, const PlanKernelOp& op);
void launch_rows(const LaunchShape& shape, const RowsKernelOp& op);
void launch_waves(const LaunchShape& shape, const RowsKernelOp& op);
void launch_combine(const LaunchShape& shape, DType dtype, const CombineKernelOp& op);
void launch_await(cudaStream_t stream, const AwaitKernelOp& op);

}  // namespace commlib::cuda
