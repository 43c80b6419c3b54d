#include "cuda/capture.h"

#include "cuda/driver.h"
#include "cuda/pool.h"

namespace commlib::cuda {
namespace {

using Kept = std::shared_ptr<void>;

struct Capture {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;  // as CUDA says it
  cudaGraph_t graph = nullptr;

  explicit Capture(cudaStream_t stream) {
#if CUDART_VERSION >= 13000
    check(cudaStreamGetCaptureInfo(stream, &status, &id, &graph, nullptr, nullptr, nullptr),
          "cudaStreamGetCaptureInfo");
#else
    check(cudaStreamGetCaptureInfo_v2(stream, &status, &id, &graph, nullptr, nullptr),
          "cudaStreamGetCaptureInfo");
#endif
  }
};

// Called on a thread of the driver's, which may not call it back.
void let_go(void* kept) {
  const std::unique_ptr<Kept> mine(static_cast<Kept*>(kept));
  keep_until(std::move(*mine), [] { return true; });
}

}  // namespace

uint64_t capture_of(cudaStream_t stream) {
  const Capture capture(stream);
  return capture.status == cudaStreamCaptureStatusNone ? 0 : capture.id;
}

void keep_with_graph(cudaStream_t stream, std::shared_ptr<void> what) {
  auto kept = std::make_unique<Kept>(std::move(what));
  cudaUserObject_t object = nullptr;
  check(cudaUserObjectCreate(&object, kept.get(), let_go, 1, cudaUserObjectNoDestructorSync),
        "cudaUserObjectCreate");
  static_cast<void>(kept.release());  // it is the user object's
  const cudaError_t error =
      cudaGraphRetainUserObject(Capture(stream).graph, object, 1, cudaGraphUserObjectMove);
  if (error != cudaSuccess) cudaUserObjectRelease(object, 1);
  check(error, "cudaGraphRetainUserObject");
}

}  // namespace commlib::cuda
