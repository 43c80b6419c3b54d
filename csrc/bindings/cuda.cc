// The module commlib._cuda: what makes the communicator of the CUDA backend, whose methods communicator.cc
// binds.
#include "bindings/bindings.h"
#include "cuda/communicator.h"
#include "cuda/driver.h"
#include "cuda/partition.h"
#include "cuda/pool.h"

using namespace commlib::python;
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
void give_streams(Config& config, std::optional<const Partition*> partition) {
  const auto take = [&] {
    return partition ? (*partition)->comm_stream() : commlib::cuda::comm_stream(config.device);
  };
  const auto both = std::make_shared<std::pair<Stream, Stream>>(take(), take());
  config.stream = reinterpret_cast<uintptr_t>(both->first.get());
  config.plan_stream = reinterpret_cast<uintptr_t>(both->second.get());
  config.stream_owner = both;
}

Owned<Communicator> make_communicator(const Config& config) {
  const ReleasedGil released;
  return Owned<Communicator>(new CudaCommunicator(config));
}

void bind_devices(py::module_& m) {
  py::class_<DeviceFacts>(m, "DeviceFacts", "What a GPU is and can do.")
      .def_readonly("name", &DeviceFacts::name)
      .def_readonly("uuid", &DeviceFacts::uuid)
      .def_readonly("sms", &DeviceFacts::sms)
      .def_readonly("capability", &DeviceFacts::capability, "90 for 9.0.")
      .def_readonly("total_memory", &DeviceFacts::memory, "Bytes.")
      .def_readonly("shares_fds", &DeviceFacts::shares_fds, "Of virtual memory.")
      .def_readonly("domain", &DeviceFacts::domain,
                    "The NVLink domain in which it can share memory with other hosts; '': none.");
  m.def("why_not", &commlib::cuda::why_not, "'', or why there is no GPU to work with.");
  m.def("properties", &commlib::cuda::facts_of, "device"_a);
  m.def("require_peer_access",
        py::overload_cast<int, const std::string&>(&commlib::cuda::require_peer_access), "device"_a, "uuid"_a,
        "Raise unless the device reaches the memory of the one with this UUID.");
}

void bind_partition(py::module_& m) {
  py::class_<ComputeStream>(m, "ComputeStream").def_property_readonly("handle", &ComputeStream::handle);
  py::class_<Partition>(m, "Partition", "A GPU's SMs in two disjoint parts, for communication and compute.")
      .def(py::init<int, int>(), "device"_a, "comm"_a, "At least `comm` SMs for communication.")
      .def_property_readonly("comm_sms", &Partition::comm_sms)
      .def_property_readonly("compute_sms", &Partition::compute_sms)
      .def("compute_stream", [](const Partition& p) { return ComputeStream{p.compute_stream()}; });
  m.def("give_streams", &give_streams, "config"_a, "partition"_a,
        "Give a communicator streams of its own, on the partition's SMs for communication if there is one.");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "commlib's CUDA backend. Imports without a driver; why_not() says what is missing.";
  py::module_::import("commlib._core");  // knows Communicator and Config
  bind_devices(m);
  bind_partition(m);
  m.def("make_communicator", &make_communicator, "config"_a);
}
