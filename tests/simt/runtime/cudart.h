// The CUDA runtime on simulated GPUs: cudart.cc defines its functions, so that csrc/cuda/ links without
// libcudart. Included before csrc/cuda/launch.cu, which g++ compiles here: it provides what nvcc adds to the
// runtime's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "simt/cuda.h"
#include "simt/gpu.h"

namespace simt {
struct Capture;
}  // namespace simt

// What is captured, in order, each on one of the streams that took part, the first of which is the one that
// the graph is launched on; and what the graph keeps.
struct CUgraph_st {
  using Start = std::function<cudaError_t(cudaStream_t)>;
  struct Node {
    size_t stream;
    Start start;
  };
  std::vector<Node> nodes;
  size_t streams = 1;
  std::vector<std::shared_ptr<void>> kept;
};
struct CUgraphExec_st : CUgraph_st {
  std::vector<cudaStream_t> others;  // its own streams, in place of those captured after the first
};
struct CUstream_st {
  int number;
  std::shared_ptr<simt::Capture> capture;  // null: nothing is captured
  size_t index;                            // among the streams of the capture
};
// Each record queues a store of its number; waiting for the event means waiting for the last store. One
// recorded in a capture belongs to that.
struct CUevent_st {
  std::shared_ptr<uint64_t> reached = std::make_shared<uint64_t>(0);
  std::shared_ptr<uint64_t> when = std::make_shared<uint64_t>(0);  // by the host's clock, in ns
  std::atomic<uint64_t> records{0};
  std::shared_ptr<simt::Capture> capture;  // in which it was last recorded
  std::vector<size_t> after;               // there: how many nodes of each stream it comes after
  std::shared_ptr<CUevent_st> in_graph;    // what the graph records in its place
};

namespace simt {

bool is_captured(cudaStream_t stream);
// Whether this thread may not make memory, nor ask what is done: it captures, and has not said that it knows
// what it does (cudaThreadExchangeStreamCaptureMode).
bool would_spoil_a_capture();
// Whether it is captured: `start` is a node of the graph then, and nothing runs now.
bool capture(cudaStream_t stream, CUgraph_st::Start start);
// The graph that it is captured in keeps `what`.
void keep_with_capture(cudaStream_t stream, std::shared_ptr<void> what);
inline int number_of(cudaStream_t stream) { return stream ? stream->number : 0; }

bool accesses_are_seen();  // the ordinary C++ ones of kernels: see accesses.cc
#ifdef __SANITIZE_THREAD__
bool accesses_are_seen() { return true; }
#endif

// What all functions work on; set while none is being called.
extern Gpu* gpu;

constexpr int kSms = 16;

// The device that it claims to be; a test may set another while there is no communicator.
struct Chip {
  int major;  // of its compute capability
  size_t shared_per_sm;
};
extern Chip chip;
extern int resident_blocks;                  // at most, of all streams; as for `chip`
size_t allocated_bytes();                    // on the device, now
extern thread_local bool next_launch_fails;  // of a kernel, by this thread
// Whether a GPU can use the memory of another.
extern bool peers_reach_each_other;

// nvcc tells the runtime which kernels exist. Here a kernel is known once its attributes are first asked for.
struct KernelFacts {
  size_t argument_bytes;
  void (*call)(const void* kernel, const void* argument);
};
void know_kernel(const void* kernel, const KernelFacts& facts);

}  // namespace simt

template <class Op>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Op)) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  simt::know_kernel(address, {sizeof(Op), [](const void* k, const void* argument) {
                                reinterpret_cast<void (*)(Op)>(k)(*static_cast<const Op*>(argument));
                              }});
  return cudaFuncGetAttributes(attributes, address);
}

template <class Op>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Op), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class Op>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Op), int threads,
                                                          size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads,
                                                       shared_bytes);
}
