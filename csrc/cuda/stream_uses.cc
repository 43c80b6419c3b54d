#include "cuda/stream_uses.h"

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

void StreamUses::note(int device, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  StreamEvent& event = last_[stream];
  if (!event) event = new_event(device);
  check(cudaEventRecord(event.get(), stream), "cudaEventRecord");
}

// A device that is lost uses nothing any more.
bool StreamUses::done() const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [_, event] : last_) {
    const cudaError_t error = cudaEventQuery(event.get());
    if (error != cudaSuccess) cudaGetLastError();
    if (error == cudaErrorNotReady) return false;
  }
  return true;
}

void StreamUses::wait_on(cudaStream_t stream) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [_, event] : last_)
    check(cudaStreamWaitEvent(stream, event.get(), 0), "cudaStreamWaitEvent");
}

}  // namespace commlib::cuda
