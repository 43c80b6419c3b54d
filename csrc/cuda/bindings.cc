// Python bindings of the CUDA backend: what makes its communicator, whose methods are bound in
// ../bindings.cc.
#include <pybind11/pybind11.h>

#include "cuda/communicator.h"
#include "cuda/driver.h"
#include "cuda/partition.h"

namespace py = pybind11;
using commlib::Communicator;
using commlib::Config;
using commlib::cuda::CudaCommunicator;
using commlib::cuda::DeviceFacts;
using commlib::cuda::Partition;

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
  py::class_<Partition>(m, "Partition")
      .def(py::init<int, int>(), py::arg("device"), py::arg("comm"))
      .def_property_readonly("comm_sms", &Partition::comm_sms)
      .def_property_readonly("compute_sms", &Partition::compute_sms)
      .def("new_comm_stream", &Partition::new_comm_stream)
      .def("new_compute_stream", &Partition::new_compute_stream);
  m.def(
      "make_communicator",
      [](const Config& config) -> std::unique_ptr<Communicator> {
        py::gil_scoped_release release;
        return std::make_unique<CudaCommunicator>(config);
      },
      py::arg("config"));
}
