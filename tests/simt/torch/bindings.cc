// What torch.cuda asks of torch._C: see standin.py. Streams and events are numbers here.
#include <pybind11/pybind11.h>

#include "simt/runtime/cudart.h"
#include "simt/runtime/host_work.h"
#include "simt/torch/device.h"

namespace py = pybind11;
using standin::check;

namespace {

cudaStream_t stream_at(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }
cudaEvent_t event_at(uintptr_t handle) { return reinterpret_cast<cudaEvent_t>(handle); }

uintptr_t new_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, 0), "cudaEventCreateWithFlags");
  return reinterpret_cast<uintptr_t>(event);
}

bool is_done(cudaError_t error, const char* call) {
  if (error != cudaErrorNotReady) check(error, call);
  cudaGetLastError();
  return error == cudaSuccess;
}

float milliseconds_between(uintptr_t begun, uintptr_t ended) {
  float ms = 0;
  check(cudaEventElapsedTime(&ms, event_at(begun), event_at(ended)), "cudaEventElapsedTime");
  return ms;
}

py::dict properties() {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, 0), "cudaGetDeviceProperties");
  return py::dict(py::arg("name") = std::string(p.name), py::arg("major") = p.major,
                  py::arg("minor") = p.minor, py::arg("multi_processor_count") = p.multiProcessorCount,
                  py::arg("total_memory") = p.totalGlobalMem);
}

// Instantiated, and nothing more of it is known.
uintptr_t end_capture(uintptr_t stream) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream_at(stream), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t exec = nullptr;
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  return reinterpret_cast<uintptr_t>(exec);
}

}  // namespace

PYBIND11_MODULE(_simulated_cuda, m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("current_stream", [] { return reinterpret_cast<uintptr_t>(standin::current_stream()); });
  m.def("set_current_stream", [](uintptr_t s) { standin::set_current_stream(stream_at(s)); });
  m.def("pooled_stream",
        [](bool urgent) { return reinterpret_cast<uintptr_t>(standin::pooled_stream(urgent)); });
  m.def("is_captured", [](uintptr_t s) { return simt::is_captured(stream_at(s)); });
  m.def("begin_capture", [](uintptr_t s) {
    check(cudaStreamBeginCapture(stream_at(s), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  });
  m.def("end_capture", &end_capture);
  m.def(
      "launch_graph",
      [](uintptr_t g, uintptr_t s) {
        check(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(g), stream_at(s)), "cudaGraphLaunch");
      },
      NoGil());
  m.def("destroy_graph", [](uintptr_t g) { cudaGraphExecDestroy(reinterpret_cast<cudaGraphExec_t>(g)); });
  m.def("query_stream",
        [](uintptr_t s) { return is_done(cudaStreamQuery(stream_at(s)), "cudaStreamQuery"); });
  m.def(
      "synchronize_stream",
      [](uintptr_t s) { check(cudaStreamSynchronize(stream_at(s)), "cudaStreamSynchronize"); }, NoGil());
  m.def("synchronize", [] { check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }, NoGil());
  m.def("sleep", [](uint64_t ns) { simt::sleep(standin::current_stream(), ns); });
  m.def("new_event", &new_event);
  m.def("destroy_event", [](uintptr_t e) { cudaEventDestroy(event_at(e)); });
  m.def("record_event", [](uintptr_t e, uintptr_t s) {
    check(cudaEventRecord(event_at(e), stream_at(s)), "cudaEventRecord");
  });
  m.def("wait_event", [](uintptr_t e, uintptr_t s) {
    check(cudaStreamWaitEvent(stream_at(s), event_at(e), 0), "cudaStreamWaitEvent");
  });
  m.def("query_event", [](uintptr_t e) { return is_done(cudaEventQuery(event_at(e)), "cudaEventQuery"); });
  m.def(
      "synchronize_event",
      [](uintptr_t e) { check(cudaEventSynchronize(event_at(e)), "cudaEventSynchronize"); }, NoGil());
  m.def("elapsed_time", &milliseconds_between);
  m.def("set_lateness", [](uint64_t ns) { simt::always_late_ns = ns; });
  m.def("properties", &properties);
  m.def("used_bytes", &standin::used_bytes);
}
