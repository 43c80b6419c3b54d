// CUDA graphs. The streams that take part in a capture are streams of the graph's own when it runs, which
// wait for each other where these did: so what nobody waits for is late there, too. No copies.
#include <algorithm>
#include <atomic>

#include "simt/runtime/capture.h"

struct CUuserObject_st {
  std::shared_ptr<void> held;
};

namespace simt {

struct Capture {
  const unsigned long long id;
  std::unique_ptr<CUgraph_st> graph = std::make_unique<CUgraph_st>();
  std::vector<cudaStream_t> streams;
  std::vector<size_t> nodes;               // of each stream
  std::vector<std::vector<size_t>> after;  // of each: how many nodes of each other its next one comes after

  explicit Capture(unsigned long long number) : id(number) {}

  void add(cudaStream_t stream) {
    stream->index = streams.size();
    streams.push_back(stream);
    nodes.push_back(0);
    after.emplace_back();
    graph->streams = streams.size();
  }
  void append(cudaStream_t stream, CUgraph_st::Start start) {
    graph->nodes.push_back({stream->index, std::move(start)});
  }
  // How many nodes of each stream are done where this one has come.
  std::vector<size_t> done(size_t stream) {
    std::vector<size_t> all = after[stream];
    all.resize(streams.size());
    all[stream] = nodes[stream];
    return all;
  }
};

namespace {

thread_local int captures = 0;  // that this thread has begun
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

}  // namespace

bool would_spoil_a_capture() { return captures > 0 && mode != cudaStreamCaptureModeRelaxed; }

bool is_captured(cudaStream_t stream) { return stream && stream->capture; }

bool capture(cudaStream_t stream, CUgraph_st::Start start) {
  if (!is_captured(stream)) return false;
  stream->capture->append(stream, std::move(start));
  ++stream->capture->nodes[stream->index];
  return true;
}

void keep_with_capture(cudaStream_t stream, std::shared_ptr<void> what) {
  stream->capture->graph->kept.push_back(std::move(what));
}

bool capture_record(cudaEvent_t event, cudaStream_t stream) {
  event->capture = is_captured(stream) ? stream->capture : nullptr;
  if (!event->capture) return false;
  event->after = event->capture->done(stream->index);
  event->in_graph = std::make_shared<CUevent_st>();
  event->capture->append(stream,
                         [e = event->in_graph](cudaStream_t on) { return cudaEventRecord(e.get(), on); });
  return true;
}

cudaError_t capture_wait(cudaEvent_t event, cudaStream_t stream) {
  const auto capture = event->capture;
  if (!capture) return cudaErrorStreamCaptureIsolation;  // of what came before
  if (!capture->graph) return cudaErrorCapturedEvent;
  if (!is_captured(stream)) {
    stream->capture = capture;
    capture->add(stream);
  }
  if (stream->capture != capture) return cudaErrorStreamCaptureMerge;
  std::vector<size_t>& after = capture->after[stream->index];
  after.resize(std::max(after.size(), event->after.size()));
  for (size_t i = 0; i < event->after.size(); ++i) after[i] = std::max(after[i], event->after[i]);
  capture->append(stream,
                  [e = event->in_graph](cudaStream_t on) { return cudaStreamWaitEvent(on, e.get(), 0); });
  return cudaSuccess;
}

}  // namespace simt

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream || simt::is_captured(stream)) return cudaErrorIllegalState;
  static std::atomic<unsigned long long> captures{0};
  stream->capture = std::make_shared<simt::Capture>(++captures);
  stream->capture->add(stream);
  ++simt::captures;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, simt::mode);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!simt::is_captured(stream)) return cudaErrorIllegalState;
  const auto capture = stream->capture;
  if (stream->index != 0) return cudaErrorStreamCaptureUnmatched;
  for (const cudaStream_t s : capture->streams) s->capture = nullptr;
  --simt::captures;
  auto made = std::move(capture->graph);
  *graph = nullptr;
  if (capture->done(0) != capture->nodes) return cudaErrorStreamCaptureUnjoined;
  *graph = made.release();
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = simt::is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
  *graph = simt::is_captured(stream) ? stream->capture->graph.get() : nullptr;
  *id = simt::is_captured(stream) ? stream->capture->id : 0;
  return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* what, cudaHostFn_t destroy, unsigned,
                                 unsigned) {
  *object = new CUuserObject_st{std::shared_ptr<void>(what, destroy)};
  return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  delete object;
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned flags) {
  if (flags != cudaGraphUserObjectMove) return cudaErrorInvalidValue;
  graph->kept.push_back(std::move(object->held));
  delete object;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{*graph, {}};
  for (size_t i = 1; i < graph->streams; ++i) {
    cudaStreamCreateWithFlags(&(*exec)->others.emplace_back(), cudaStreamNonBlocking);
  }
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const CUgraph_st::Node& node : exec->nodes) {
    const cudaStream_t on = node.stream == 0 ? stream : exec->others[node.stream - 1];
    if (const cudaError_t error = node.start(on)) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  for (const cudaStream_t stream : exec->others) cudaStreamDestroy(stream);
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

}  // extern "C"
