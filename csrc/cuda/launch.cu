#include "cuda/launch.h"

#include <stdexcept>

#include "cuda/driver.h"
#include "cuda/kernels.cuh"
#include "cuda/plan.cuh"

namespace commlib::cuda {
namespace {

constexpr int kAwaitSharedBytes = kBlockSharedBytes + WarpShared::bytes(0);
// Of each warp's ring. The most: times 16 warps it fits beside the rest in the 227 KB of sm_90. The least:
// two chunks of a sum, one that is added and one that comes.
constexpr int kMostRing = 12 * 1024;
constexpr int kLeastRing = 2 * kLongestChunk;
constexpr int kRingUnit = 1024;

// What each warp's ring can be where a block may have so much shared memory: 99 KB on compute capability
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

using CombineKernel = void (*)(const CombineOp);

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

// Of an SM, what a block takes. Registers come in parts of 256 for each warp.
struct Room {
  int registers = 0, shared_bytes = 0, threads = 0;

  template <class Kernel>
  static Room of(Kernel kernel, int warps, int shared_bytes) {
    constexpr int kSystemBytes = 1024;  // of shared memory, for each block
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    return {warps * static_cast<int>(align_up(attributes.numRegs * kWarpLanes, 256)),
            shared_bytes + kSystemBytes, warps * kWarpLanes};
  }
  Room operator*(int n) const { return {registers * n, shared_bytes * n, threads * n}; }
  Room operator+(const Room& o) const {
    return {registers + o.registers, shared_bytes + o.shared_bytes, threads + o.threads};
  }
  bool fits(const DeviceFacts& facts) const {
    return registers <= facts.registers_per_sm && shared_bytes <= facts.shared_per_sm &&
           threads <= facts.threads_per_sm;
  }
};

}  // namespace

LaunchShape prepare_kernels(int device, int blocks, cudaStream_t stream) {
  const DeviceFacts facts = facts_of(device);
  LaunchShape shape{blocks, 0, ring_bytes_on(facts), stream};
  const int needed = kBlockSharedBytes + kWarps * WarpShared::bytes(shape.ring_bytes);
  const int half = facts.shared_per_sm / 2 + 1024;  // more than half an SM's: no second block fits
  shape.shared_bytes = needed > half ? needed : half;
  if (shape.shared_bytes > facts.shared_per_block) shape.shared_bytes = facts.shared_per_block;
  prepare(waves_kernel, shape, facts.sms);
  prepare_rows<WarpWorker>(shape, facts.sms);
  prepare_rows<HopsWorker>(shape, facts.sms);
  Room::of(plan_kernel, kPlanWarps, kPlanSharedBytes);  // which loads them
  Room::of(await_kernel, 1, kAwaitSharedBytes);
  return shape;
}

bool plans_fit_beside_rows(int device, const LaunchShape& shape, DType dtype) {
  constexpr int kWaitingRanks = 8;  // that may all wait on one SM
  const DeviceFacts facts = facts_of(device);
  const Room plan = Room::of(plan_kernel, kPlanWarps, kPlanSharedBytes);
  const Room waits = Room::of(await_kernel, 1, kAwaitSharedBytes) * kWaitingRanks;
  const auto fit = [&](auto kernel) {
    const Room rows = Room::of(kernel, kWarps, shape.shared_bytes);
    return (rows + plan).fits(facts) && (rows + waits).fits(facts);
  };
  return fit(rows_kernel<WarpWorker>) && fit(waves_kernel) && fit(combine_kernel_of<WarpWorker>(dtype));
}

// Neither copies rows, so their warps have no ring.
void launch_plan(cudaStream_t stream, const PlanOp& op) {
  launch(plan_kernel, dim3(1), kPlanWarps, kPlanSharedBytes, stream, op, "plan_kernel");
}

void launch_rows(const LaunchShape& shape, const RowsOp& op) {
  launch(op.common.peers.hops ? rows_kernel<HopsWorker> : rows_kernel<WarpWorker>, shape, op, "rows_kernel");
}

void launch_waves(const LaunchShape& shape, const WavesOp& op) {
  launch(waves_kernel, shape, op, "waves_kernel");
}

void launch_combine(const LaunchShape& shape, DType dtype, const CombineOp& op) {
  const bool hops = op.common.peers.hops != nullptr;
  launch(hops ? combine_kernel_of<HopsWorker>(dtype) : combine_kernel_of<WarpWorker>(dtype), shape, op,
         "combine_kernel");
}

void launch_await(cudaStream_t stream, const AwaitOp& op) {
  launch(await_kernel, dim3(1), 1, kAwaitSharedBytes, stream, op, "await_kernel");
}

}  // namespace commlib::cuda
