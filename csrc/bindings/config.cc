// What a communicator is made from, and which rank owns which expert.
#include <cstring>

#include "backend/communicator.h"
#include "base/placement.h"
#include "bindings/bindings.h"
#include "net/ucx_transport.h"

namespace commlib::python {

// Python's, by its name in stubs.
class Range : public py::object {
  PYBIND11_OBJECT(Range, py::object, PyRange_Check)
};

}  // namespace commlib::python

template <>
struct pybind11::detail::handle_type_name<commlib::python::Range> {
  static constexpr auto name = const_name("range");
};

namespace commlib::python {
namespace {

// Products of the two fit in 32 bits: see Placement.
Placement placement_of(int64_t experts, int64_t ranks) {
  constexpr int64_t kMostExperts = 1 << 20, kMostRanks = (1 << 12) - 1;
  if (experts < 1 || experts > kMostExperts || ranks < 1 || ranks > kMostRanks) {
    throw std::invalid_argument("a placement has 1 to " + std::to_string(kMostExperts) +
                                " experts and 1 to " + std::to_string(kMostRanks) + " ranks, got " +
                                std::to_string(experts) + " and " + std::to_string(ranks));
  }
  return {experts, ranks};
}

Range experts_of(const Placement& placement, int64_t rank) {
  if (rank < 0 || rank >= placement.ranks) {
    throw py::index_error("rank " + std::to_string(rank) + " of " + std::to_string(placement.ranks));
  }
  const auto range = py::handle(reinterpret_cast<PyObject*>(&PyRange_Type));
  return Range(range(placement.first_expert(rank), placement.first_expert(rank + 1)));
}

std::vector<int> owners(const Placement& placement) {
  std::vector<int> by_expert;
  for (int64_t e = 0; e < placement.experts; ++e) by_expert.push_back(placement.owner(e));
  return by_expert;
}

void bind_placement(py::module_& m) {
  py::class_<Placement>(m, "Placement", R"(Which rank owns which expert: contiguous blocks.

Their sizes differ by one at most.

Raises:
    ValueError: fewer than one of either, more than 2**20 experts, or more than 4095 ranks.)")
      .def(py::init(&placement_of), "experts"_a, "ranks"_a)
      .def("experts_of", &experts_of, "rank"_a,
           "The experts of one rank. Raises IndexError where there is no such rank.")
      .def_property_readonly("owners", &owners, "The owner of each expert.");
}

Key key_of(const std::string& bytes) {
  Key key;
  if (bytes.size() != key.size()) throw std::invalid_argument("a key has 16 bytes");
  std::memcpy(key.data(), bytes.data(), key.size());
  return key;
}

void use_ucx(Config& c, const std::vector<std::pair<py::bytes, py::bytes>>& keys, bool loopback) {
  for (const auto& [shown, expected] : keys) c.net.keys.push_back({key_of(shown), key_of(expected)});
  c.net.make_transport = [size = c.size, options = UcxOptions{c.stream != 0, loopback}] {
    return make_ucx_transport(size, options);
  };
}

Config new_config() {
  Config c;
  c.interrupted = interrupted;
  c.let_go = HeldObject::let_go_now;
  return c;
}

void bind_shape(py::class_<Config>& config) {
  field(config, "rank", &Config::rank);
  field(config, "size", &Config::size);
  field(config, "experts", &Config::experts);
  field(config, "hidden", &Config::hidden);
  field(config, "topk", &Config::topk);
  field(config, "max_tokens", &Config::max_tokens);
  field(config, "capacity", &Config::capacity);
  field(config, "grouped_rows", &Config::grouped_rows);
  field(config, "dtype", &Config::dtype);
  field(config, "slots", &Config::slots);
}

void bind_running(py::class_<Config>& config) {
  field(config, "num_sms", &Config::num_sms);
  field(config, "timeout", &Config::timeout);
  field(config, "link_gbps", &Config::link_gbps);
  field(config, "net", &Config::net);
  field(config, "team", &Config::team);
  field(config, "first_epoch", &Config::first_epoch);
  field(config, "spin", &Config::spin);
  field(config, "vector_ops", &Config::vector_ops);
  field(config, "cores", &Config::cores);
  field(config, "device", &Config::device);
  field(config, "stream", &Config::stream);
  field(config, "plan_stream", &Config::plan_stream);
  field(config, "share", &Config::share);
}

constexpr const char* kAboutConfig = R"(What a communicator is made from.

Attributes:
    size: ranks.
    max_tokens: of one rank, in one dispatch.
    capacity: rows that a rank can receive.
    grouped_rows: for as many rows grouped by expert a slot has room; 0: they lie in none.
    num_sms: threads (CPU) or blocks (CUDA).
    timeout: seconds.
    link_gbps: emulated limit of this rank's link, in GB/s; 0: none.
    first_epoch: for tests.
    vector_ops: CPU: one of available_vector_ops(), or empty: the widest.
    cores: CPU: that threads may run on; empty: any.
    device: CUDA: its number.
    stream: CUDA: of communication; 0 on the CPU.
    plan_stream: CUDA: of plans; 0: the same.
    share: CUDA: how heaps reach other processes, "fd", "fabric" or "none".)";

constexpr const char* kAboutNetConfig = R"(Ranks on other nodes.

Attributes:
    node_of: by rank; empty: all share one node.
    hierarchical: one gateway for each node, or each rank its own.
    chunk_bytes: 0: what suits.
    chunks: 0: what suits.)";

}  // namespace

void bind_config(py::module_& m) {
  bind_placement(m);

  py::enum_<DType>(m, "DType", "The elements of rows.")
      .value("bf16", DType::bf16)
      .value("f16", DType::f16)
      .value("f32", DType::f32)
      .value("f64", DType::f64);

  py::class_<SpinPolicy>(m, "SpinPolicy", "How long a wait burns its core before it sleeps.")
      .def(py::init([](int pauses, int yields) { return SpinPolicy{pauses, yields}; }), "pauses"_a,
           "yields"_a);

  py::class_<NetConfig> net(m, "NetConfig", kAboutNetConfig);
  field(net, "node_of", &NetConfig::node_of);
  field(net, "hierarchical", &NetConfig::hierarchical);
  field(net, "chunk_bytes", &NetConfig::chunk_bytes);
  field(net, "chunks", &NetConfig::chunks);

  py::class_<Team, std::shared_ptr<Team>>(m, "Team",
                                          "All communicators of one rank with the same other ranks.")
      .def(py::init<>())
      .def_property_readonly("has_given_up", py::cpp_function(&Team::has_given_up, NoGil()),
                             "Whether one of them has ever given up.");

  py::class_<Config> config(m, "Config", kAboutConfig);
  config.def(py::init(&new_config));
  bind_shape(config);
  bind_running(config);
  config.def(
      "use_ucx", &use_ucx, "keys"_a, "loopback"_a,
      "Reach other nodes over UCX. Keys by rank: what messages to it show, and what those from it must "
      "show.");
}

}  // namespace commlib::python
