// What only the CPU has: its communicator, and the data path by itself, for tests of vector widths against
// each other.
#include "bindings/bindings.h"
#include "bindings/memory.h"
#include "cpu/communicator.h"
#include "cpu/vector_ops.h"

namespace commlib::python {
namespace {

void bare_pull(CpuCommunicator& c, const RoutePlan& routing, Address out) {
  c.bare_pull(routing, at<std::byte>(out));
}

void multicast(const std::string& name, const std::vector<Address>& dst, Address src, int64_t bytes) {
  std::vector<std::byte*> to;
  for (const Address a : dst) to.push_back(at<std::byte>(a));
  vector_ops(name).multicast(to.data(), static_cast<int>(to.size()), at<std::byte>(src), bytes);
  vector_ops(name).flush();
}

void reduce(const std::string& name, DType dtype, Address dst, const std::vector<Address>& src,
            const std::vector<Address>& weights, int64_t elements) {
  std::vector<Term> terms;
  for (size_t j = 0; j < src.size(); ++j) {
    terms.push_back({at<std::byte>(src[j]), weights.empty() ? nullptr : at<std::byte>(weights[j])});
  }
  vector_ops(name).reduce[static_cast<int>(dtype)](at<std::byte>(dst), terms.data(),
                                                   static_cast<int>(terms.size()), elements, {});
  vector_ops(name).flush();
}

void weigh(const std::string& name, DType dtype, Address dst, Address row, Address weight, Address y,
           int64_t elements, Address dot) {
  vector_ops(name).weigh[static_cast<int>(dtype)](at<std::byte>(dst),
                                                  {at<std::byte>(row), at<std::byte>(weight)},
                                                  at<std::byte>(y), elements, at<std::byte>(dot));
  vector_ops(name).flush();
}

void quantize(const std::string& name, const Conversion& how, Address rows, Address scales, Address src) {
  const QuantizeFn quantize = vector_ops(name).quantize[static_cast<int>(how.from)];
  if (!quantize) throw std::invalid_argument("float64 rows are not converted");
  quantize(at<std::byte>(rows), at<std::byte>(scales), at<std::byte>(src), how);
}

}  // namespace

void bind_cpu(py::module_& m) {
  py::class_<CpuCommunicator, Communicator, Owned<CpuCommunicator>>(m, "CpuCommunicator",
                                                                    "A rank on the CPU.")
      .def(py::init<const Config&>(), "config"_a, NoGil())
      .def("new_rows", &new_rows, "rows"_a, NoGil(), "Memory that is used again when it has gone.")
      .def("bare_send", &CpuCommunicator::bare_send, "rows"_a, "routing"_a, NoGil(),
           "For benchmarks: one worker sends the rows, and nothing else.")
      .def("bare_pull", &bare_pull, "routing"_a, "out"_a, NoGil(),
           "For benchmarks: one worker pulls the rows, and nothing else.")
      .def_property_readonly("vector_ops", &CpuCommunicator::vector_ops_name)
      .def_property_readonly("idle_bytes", &CpuCommunicator::idle_bytes);

  m.def("available_vector_ops", &available_vector_ops, "What this processor runs, the widest first.");
  m.def("multicast", &multicast, "name"_a, "dst"_a, "src"_a, "bytes"_a,
        "For tests: store one row in many places, in this vector width.");
  m.def("reduce", &reduce, "name"_a, "dtype"_a, "dst"_a, "src"_a, "weights"_a, "elements"_a,
        "For tests: sum rows, each times its weight, in this vector width.");
  m.def("weigh", &weigh, "name"_a, "dtype"_a, "dst"_a, "row"_a, "weight"_a, "y"_a, "elements"_a, "dot"_a,
        "For tests: a row times its weight, and its product with another one, in this vector width.");
  m.def("quantize", &quantize, "name"_a, "how"_a, "rows"_a, "scales"_a, "src"_a,
        "For tests: convert a row, in this vector width.");
}

}  // namespace commlib::python
