// Streams of others that use some memory, each with how far it must come before the memory may be used again.
#pragma once

#include <map>
#include <mutex>

#include "cuda/pool.h"

namespace commlib::cuda {

using StreamEvent = std::shared_ptr<CUevent_st>;

class StreamUses {
 public:
  // What has been queued on `stream` until now uses the memory. From any thread; does not wait. Nothing can
  // be known of a stream that is being captured: it counts as using the memory until the capture has ended,
  // and then with all that is queued at that time.
  void note(int device, cudaStream_t stream);
  // Whether all such work is done.
  bool done();
  // What is queued on `stream` from now on comes after that work, as far as it is known.
  void wait_on(cudaStream_t stream);
  // What is captured on `stream` from now on comes after what its capture has on those streams so far.
  void join(cudaStream_t stream);

 private:
  struct Use {
    int device;
    StreamEvent event;
    bool recorded = false;
  };
  static void record(cudaStream_t stream, Use& use);

  std::mutex mutex_;  // guards uses_
  std::map<cudaStream_t, Use> uses_;
};

}  // namespace commlib::cuda
