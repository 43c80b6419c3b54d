// Streams of others that use some memory, each with how far it must come before the memory may be used again.
#pragma once

#include <map>
#include <mutex>

#include "cuda/pool.h"

namespace commlib::cuda {

using StreamEvent = std::shared_ptr<CUevent_st>;

class StreamUses {
 public:
  // What has been queued on `stream` until now uses it. From any thread; does not wait.
  void note(int device, cudaStream_t stream);
  // Whether all of it is done.
  bool done() const;
  // What is queued on `stream` from now on comes after it.
  void wait_on(cudaStream_t stream) const;

 private:
  mutable std::mutex mutex_;  // guards last_
  std::map<cudaStream_t, StreamEvent> last_;
};

}  // namespace commlib::cuda
