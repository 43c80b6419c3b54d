#include "cuda/launch.h"

#include <stdexcept>

#include "cuda/driver.h"
#include "cuda/kernels.cuh"
#include "cuda/plan.cuh"

namespace commlib::cuda {
namespace {

constexpr int kAwaitSharedBytes = kBlockSharedBytes + WarpShared::bytes(0);
// Bytes of each warp's ring. The most: for 16 warps, they fit beside the rest in the 227 KB of sm_90. The
// least: two chunks of a sum, one that is being added and one that is on its way.
constexpr int kMostRing = 12 * 1024;
constexpr int kLeastRing = 2 * kLongestChunk;
constexpr int kRingUnit = 1024;

// The size of each warp's ring, from the shared memory that a block may have: 99 KB on compute capability
// 12.x.
int ring_bytes_on(const DeviceFacts& facts) {
  if (facts.capability < 90) return 0;
  const int each = (facts.shared_per_block - kBlockSharedBytes) / kWarps - WarpShared::bytes(0);
  const int ring = each / kRingUnit * kRingUnit;
  if (ring < kLeastRing) {
    throw std::runtime_error(facts.name + " gives a block " + std::to_string(facts.shared_per_block) +
                             " bytes of shared memory; commlib's copies need " +
                             std::to_string(kBlockSharedBytes + kWarps * WarpShared::bytes(kLeastRing)));
  }
  return ring < kMostRing ? ring : kMostRing;
}

using CombineKernel = void (*)(const CombineKernelOp);

template <class Worker>
CombineKernel combine_kernel_of(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return combine_kernel<Bf16, Worker>;
    case DType::f16:
      return combine_kernel<Half, Worker>;
    case DType::f32:
      return combine_kernel<float, Worker>;
    case DType::f64:
      break;
  }
  return combine_kernel<double, Worker>;
}

template <class Kernel>
void prepare(Kernel kernel, const LaunchShape& shape, int sms) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes",
        "Was commlib built for this GPU? COMMLIB_CUDA_ARCHS chooses the targets of a build.");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes),
        "cudaFuncSetAttribute");
  int per_sm = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, shape.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (per_sm < 1 || per_sm * sms < shape.blocks) {
    throw std::runtime_error("num_sms is " + std::to_string(shape.blocks) + ", but the device has " +
                             std::to_string(sms) + " SMs, and all blocks must run at once");
  }
}

template <class Worker>
void prepare_rows(const LaunchShape& shape, int sms) {
  prepare(rows_kernel<Worker>, shape, sms);
  for (const DType t : {DType::bf16, DType::f16, DType::f32, DType::f64}) {
    prepare(combine_kernel_of<Worker>(t), shape, sms);
  }
}

template <class Kernel, class Op>
void launch(Kernel kernel, dim3 blocks, int warps, int shared_bytes, cudaStream_t stream, const Op& op,
            const char* name) {
  void* arguments[] = {const_cast<Op*>(&op)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(warps * kWarpLanes), arguments,
                         shared_bytes, stream),
        name);
}

template <class Kernel, class Op>
void launch(Kernel kernel, const LaunchShape& shape, const Op& op, const char* name) {
  launch(kernel, dim3(shape.blocks), kWarps, shape.shared_bytes, shape.stream, op, name);
}

// Loads a kernel of few warps, which need no room of their own. An SM runs blocks side by side only if they
// prefer the same share of shared memory, and blocks that move rows want all of it.
template <class Kernel>
void prepare_small(Kernel kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute");
}

}  // namespace

LaunchShape prepare_kernels(int device, int blocks, cudaStream_t stream) {
  const DeviceFacts facts = facts_of(device);
  LaunchShape shape{blocks, 0, ring_bytes_on(facts), stream};
  const int needed = kBlockSharedBytes + kWarps * WarpShared::bytes(shape.ring_bytes);
  const int half = facts.shared_per_sm / 2 + 1024;  // more than half an SM's: no second block fits
  shape.shared_bytes = needed > half ? needed : half;
  if (shape.shared_bytes > facts.shared_per_block) shape.shared_bytes = facts.shared_per_block;
  prepare(waves_kernel, shape, facts.sms);
  prepare(rows_kernel<ConvertingWorker>, shape, facts.sms);
  prepare_rows<WarpWorker>(shape, facts.sms);
  prepare_rows<InternodeWorker>(shape, facts.sms);
  prepare_small(plan_kernel);
  prepare_small(group_plan_kernel);
  prepare_small(bounded_plan_kernel);
  prepare_small(await_kernel);
  return shape;
}

// None copies rows, so their warps have no ring.
void launch_plan(cudaStream_t stream, const PlanKernelOp& op) {
  launch(op.plan.groups ? group_plan_kernel : plan_kernel, dim3(1), kPlanWarps, kPlanSharedBytes, stream, op,
         "plan_kernel");
}

void launch_bounded_plan(cudaStream_t stream, const PlanKernelOp& op) {
  launch(bounded_plan_kernel, dim3(1), kPlanWarps, kPlanSharedBytes, stream, op, "bounded_plan_kernel");
}

void launch_rows(const LaunchShape& shape, const RowsKernelOp& op) {
  if (op.common.peers.internode && op.rows.send.conversion.any()) {
    throw std::invalid_argument(
        "kernels that reach other nodes convert no rows: give them as they are to be sent");
  }
  const auto kernel = op.common.peers.internode       ? rows_kernel<InternodeWorker>
                      : op.rows.send.conversion.any() ? rows_kernel<ConvertingWorker>
                                                      : rows_kernel<WarpWorker>;
  launch(kernel, shape, op, "rows_kernel");
}

void launch_waves(const LaunchShape& shape, const RowsKernelOp& op) {
  launch(waves_kernel, shape, op, "waves_kernel");
}

void launch_combine(const LaunchShape& shape, DType dtype, const CombineKernelOp& op) {
  const bool internode = op.common.peers.internode != nullptr;
  launch(internode ? combine_kernel_of<InternodeWorker>(dtype) : combine_kernel_of<WarpWorker>(dtype), shape,
         op, "combine_kernel");
}

void launch_await(cudaStream_t stream, const AwaitKernelOp& op) {
  launch(await_kernel, dim3(1), 1, kAwaitSharedBytes, stream, op, "await_kernel");
}

}  // namespace commlib::cuda
