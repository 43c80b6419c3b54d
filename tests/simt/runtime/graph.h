// What ranks capture in CUDA graphs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>

#include "cpp/operations.h"
#include "cuda/driver.h"

namespace commlib::testing {

inline cudaStream_t stream_of(const Rank& self) {
  return reinterpret_cast<cudaStream_t>(self.comm->config().stream);
}

class Graph {
 public:
  template <class Body>
  Graph(const Rank& self, Body body) {
    cuda::check(cudaStreamBeginCapture(stream_of(self), cudaStreamCaptureModeThreadLocal),
                "cudaStreamBeginCapture");
    try {
      body();
    } catch (...) {
      end_capture(self);
      cudaGraphDestroy(graph_);
      throw;
    }
    end_capture(self);
    cuda::check(cudaGraphInstantiate(&exec_, graph_, 0), "cudaGraphInstantiate");
    cuda::check(cudaEventCreateWithFlags(&launched_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }
  ~Graph() {
    cudaEventDestroy(launched_);
    if (exec_) cudaGraphExecDestroy(exec_);
    if (graph_) cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Plans have a stream of their own, which comes after whatever may have written their ids.
  void launch(const Rank& self) const {
    launch(stream_of(self));
    cuda::check(cudaEventRecord(launched_, stream_of(self)), "cudaEventRecord");
    const auto plans = reinterpret_cast<cudaStream_t>(self.comm->plan_stream());
    cuda::check(cudaStreamWaitEvent(plans, launched_, 0), "cudaStreamWaitEvent");
  }
  void launch(cudaStream_t stream) const { cuda::check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch"); }

 private:
  void end_capture(const Rank& self) {
    cuda::check(cudaStreamEndCapture(stream_of(self), &graph_), "cudaStreamEndCapture");
  }

  cudaEvent_t launched_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

inline void forget(const Buffer& results) {
  std::memset(results.data(), 0x77, static_cast<size_t>(results.bytes()));
}

}  // namespace commlib::testing
