#include "cuda/partition.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace commlib::cuda {
namespace {

// Parts of 8 SMs keep thread block clusters whole from sm_90 on; smaller parts do without clusters, which
// communication kernels do not use.
unsigned split_flags(int capability, int comm) {
  const bool whole_clusters = capability >= 90 && comm % 8 == 0;
  return whole_clusters ? 0 : static_cast<unsigned>(CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING);
}

}  // namespace

Partition::Partition(int device, int comm) : device_(device) {
  static std::mutex mutex;
  static auto* const made = new std::map<std::pair<int, int>, Parts>;  // by device and comm
  std::lock_guard<std::mutex> lock(mutex);
  auto found = made->find({device, comm});
  if (found == made->end()) found = made->insert({{device, comm}, split(device, comm)}).first;
  parts_ = &found->second;
}

Partition::Parts Partition::split(int device, int comm) {
  const OnDevice guard(device);
  check(cudaFree(nullptr), "cudaFree", "The device's context could not be made.");
  const Driver& d = driver();
  if (!d.green_context_create) {
    throw std::runtime_error(
        "this NVIDIA driver has no green contexts: SM partitions need CUDA 12.5 or newer");
  }
  CUdevResource all{}, part{}, rest{};
  check(d.device_get_resource(device, &all, CU_DEV_RESOURCE_TYPE_SM), "cuDeviceGetDevResource");
  const auto sms = static_cast<int>(all.sm.smCount);
  if (comm < 1 || comm >= sms) {
    throw std::invalid_argument("comm must lie in [1, " + std::to_string(sms) + ") on this GPU, got " +
                                std::to_string(comm));
  }
  unsigned groups = 1;
  check(d.resource_split(&part, &groups, &all, &rest, split_flags(facts_of(device).capability, comm),
                         static_cast<unsigned>(comm)),
        "cuDevSmResourceSplitByCount");
  if (rest.sm.smCount == 0) {
    throw std::invalid_argument(std::to_string(comm) +
                                " SMs for communication leave none for compute: this GPU "
                                "splits off " +
                                std::to_string(part.sm.smCount));
  }
  return {make_part(device, part), make_part(device, rest)};
}

Partition::Part Partition::make_part(int device, CUdevResource& sms) {
  const Driver& d = driver();
  CUdevResourceDesc description = nullptr;
  check(d.resource_describe(&description, &sms, 1), "cuDevResourceGenerateDesc");
  Part part;
  part.sms = static_cast<int>(sms.sm.smCount);
  check(d.green_context_create(&part.context, description, device, CU_GREEN_CTX_DEFAULT_STREAM),
        "cuGreenCtxCreate");
  return part;
}

Stream Partition::stream_on(const Part& part, int priority) const {
  const auto make = [&]() -> void* {
    CUstream stream = nullptr;
    check(driver().green_context_stream(&stream, part.context, CU_STREAM_NON_BLOCKING, priority),
          "cuGreenCtxStreamCreate");
    return stream;
  };
  const std::string name = "stream of a part " + std::to_string(reinterpret_cast<uintptr_t>(part.context));
  return std::static_pointer_cast<CUstream_st>(pooled(device_, name, make, nullptr));
}

Stream Partition::comm_stream() const {
  const OnDevice guard(device_);
  return stream_on(parts_->comm, highest_priority());
}

Stream Partition::compute_stream() const { return stream_on(parts_->compute, 0); }

}  // namespace commlib::cuda
