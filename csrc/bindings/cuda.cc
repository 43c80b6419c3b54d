// Python bindings of the CUDA backend: what makes its communicator, whose methods are bound in
// core.cc.
#include <pybind11/pybind11.h>

#include "bindings/python.h"
#include "cuda/communicator.h"
#include "cuda/driver.h"
#include "cuda/partition.h"
#include "cuda/pool.h"

namespace py = pybind11;
using commlib::Communicator;
using commlib::Config;
using commlib::cuda::CudaCommunicator;
using commlib::cuda::DeviceFacts;
using commlib::cuda::Partition;
using commlib::cuda::Stream;

namespace {

// Compute's, which may still be at work when its user goes.
class ComputeStream {
 public:
  explicit ComputeStream(Stream stream) : stream_(std::move(stream)) {}
  ComputeStream(ComputeStream&&) = default;
  ~ComputeStream() {
    if (stream_)
      commlib::cuda::keep_until(stream_, [s = stream_.get()] { return commlib::cuda::is_idle(s); });
  }
  uintptr_t handle() const { return reinterpret_cast<uintptr_t>(stream_.get()); }

 private:
  Stream stream_;
};

// One for rows and one for plans.
void give_streams(Config& config, const Partition* partition) {
  const auto take = [&] {
    return partition ? partition->comm_stream() : commlib::cuda::comm_stream(config.device);
  };
  const auto both = std::make_shared<std::pair<Stream, Stream>>(take(), take());
  config.stream = reinterpret_cast<uintptr_t>(both->first.get());
  config.plan_stream = reinterpret_cast<uintptr_t>(both->second.get());
  config.stream_owner = both;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "commlib's CUDA backend. Imports without a driver; why_not() says what is missing.";
  py::module_::import("commlib._core");  // knows Communicator and Config
  m.def("why_not", &commlib::cuda::why_not);
  py::class_<DeviceFacts>(m, "DeviceFacts")
      .def_readonly("name", &DeviceFacts::name)
      .def_readonly("uuid", &DeviceFacts::uuid)
      .def_readonly("sms", &DeviceFacts::sms)
      .def_readonly("capability", &DeviceFacts::capability)
      .def_readonly("total_memory", &DeviceFacts::memory)
      .def_readonly("shares_fds", &DeviceFacts::shares_fds)
      .def_readonly("domain", &DeviceFacts::domain);
  m.def("properties", &commlib::cuda::facts_of, py::arg("device"));
  m.def("require_peer_access",
        py::overload_cast<int, const std::string&>(&commlib::cuda::require_peer_access), py::arg("device"),
        py::arg("uuid"));
  py::class_<ComputeStream>(m, "ComputeStream").def_property_readonly("handle", &ComputeStream::handle);
  py::class_<Partition>(m, "Partition")
      .def(py::init<int, int>(), py::arg("device"), py::arg("comm"))
      .def_property_readonly("comm_sms", &Partition::comm_sms)
      .def_property_readonly("compute_sms", &Partition::compute_sms)
      .def("compute_stream", [](const Partition& p) { return ComputeStream{p.compute_stream()}; });
  m.def("give_streams", &give_streams, py::arg("config"), py::arg("partition").none(true));
  m.def(
      "make_communicator",
      [](const Config& config) -> commlib::python::Owned<Communicator> {
        commlib::python::ReleasedGil released;
        return commlib::python::Owned<Communicator>(new CudaCommunicator(config));
      },
      py::arg("config"));
}
