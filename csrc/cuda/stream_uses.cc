#include "cuda/stream_uses.h"

#include "cuda/capture.h"
#include "cuda/driver.h"

namespace commlib::cuda {
namespace {

StreamEvent new_event(int device) {
  const auto make = []() -> void* {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    return event;
  };
  return std::static_pointer_cast<CUevent_st>(
      pooled(device, "event", make, [](void* e) { cudaEventDestroy(static_cast<cudaEvent_t>(e)); }));
}

}  // namespace

void StreamUses::record(cudaStream_t stream, Use& use) {
  const OnDevice guard(use.device);
  if (capture_of(stream) != 0) return;
  check(cudaEventRecord(use.event.get(), stream), "cudaEventRecord");
  use.recorded = true;
}

void StreamUses::note(int device, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  Use& use = uses_[stream];
  if (!use.event) use = {device, new_event(device)};
  use.recorded = false;
  record(stream, use);
}

// A device that is lost uses nothing any more.
bool StreamUses::done() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [stream, use] : uses_) {
    if (!use.recorded) record(stream, use);
    if (!use.recorded) return false;
    const OnDevice guard(use.device);
    const cudaError_t error = cudaEventQuery(use.event.get());
    if (error != cudaSuccess) cudaGetLastError();
    if (error == cudaErrorNotReady) return false;
  }
  return true;
}

void StreamUses::wait_on(cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [user, use] : uses_) {
    if (!use.recorded) record(user, use);
    if (use.recorded) check(cudaStreamWaitEvent(stream, use.event.get(), 0), "cudaStreamWaitEvent");
  }
}

void StreamUses::join(cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t capture = capture_of(stream);
  for (auto& [user, use] : uses_) {
    if (use.recorded || user == stream || capture_of(user) != capture) continue;
    check(cudaEventRecord(use.event.get(), user), "cudaEventRecord");
    check(cudaStreamWaitEvent(stream, use.event.get(), 0), "cudaStreamWaitEvent");
  }
}

}  // namespace commlib::cuda
