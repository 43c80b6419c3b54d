// CUDA graphs: what is captured on a stream runs when the graph does, without the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

namespace commlib::cuda {

// The number, in this process, of the capture that `stream` takes part in; 0: there is none.
uint64_t capture_of(cudaStream_t stream);
// The graph that `stream` captures into keeps `what` until it and all that is made of it are gone. `what`
// then goes on a thread of the host's that next takes something from the pool (pool.h).
void keep_with_graph(cudaStream_t stream, std::shared_ptr<void> what);

}  // namespace commlib::cuda
