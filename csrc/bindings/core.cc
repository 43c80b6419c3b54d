// Python bindings: converts, releases the GIL, translates errors. No logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/dlpack.h"
#include "bindings/python.h"
#include "cpu/communicator.h"
#include "net/network.h"
#include "net/ucx_transport.h"

namespace py = pybind11;

namespace commlib {
namespace {

using python::EndAtHome;
using python::HeldObject;
using python::Interrupt;
using python::NoGil;
using python::Owned;
using python::ReleasedGil;
using Address = uintptr_t;  // 0: none

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// Rows that keep their owner (a slot lease, a pooled buffer) alive; torch.from_dlpack takes them.
struct Memory {
  std::shared_ptr<void> owner;
  void* data;
  int64_t rows;
  int64_t columns;
  dlpack::DataType type;
  dlpack::Device device;
};

dlpack::DataType type_of(DType dtype) {
  const uint8_t code = dtype == DType::bf16 ? dlpack::kBfloat : dlpack::kFloat;
  return {code, static_cast<uint8_t>(8 * size_of(dtype)), 1};
}
constexpr dlpack::DataType kBytes{dlpack::kUInt, 8, 1};

struct DlpackContext {
  dlpack::ManagedTensor managed;
  std::shared_ptr<void> owner;
  int64_t shape[2];
};

py::capsule to_dlpack(const Memory& m) {
  auto* c = new DlpackContext{{}, m.owner, {m.rows, m.columns}};
  c->managed.tensor = {m.data, m.device, 2, m.type, c->shape, nullptr, 0};
  c->managed.context = c;
  c->managed.deleter = [](dlpack::ManagedTensor* t) { delete static_cast<DlpackContext*>(t->context); };
  return py::capsule(&c->managed, "dltensor", [](PyObject* capsule) {
    // A consumer renames the capsule and calls the deleter itself.
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* t = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    t->deleter(t);
  });
}

// Rows in a slot, or their scales; those that are not the communicator's own as bytes.
Memory view_of(std::shared_ptr<SlotLease> lease, int64_t rows, const RowFormat& format, bool scales,
               const Communicator& comm) {
  const Config& config = comm.config();
  const SlotLayout layout = lease->layout().with(format);
  const RowArray array = scales ? layout.scales() : layout.rows();
  std::byte* data = lease->slot().rows + array.at;
  const dlpack::Device device =
      config.stream ? dlpack::Device{dlpack::kCuda, config.device} : dlpack::Device{dlpack::kHost, 0};
  if (format.is_own()) return {std::move(lease), data, rows, config.hidden, type_of(config.dtype), device};
  return {std::move(lease), data, rows, array.bytes, kBytes, device};
}

Memory new_rows(CpuCommunicator& comm, int64_t rows) {
  auto buffer = comm.new_rows(rows);
  void* data = buffer.get();
  const Config& config = comm.config();
  return {std::move(buffer), data, rows, config.hidden, type_of(config.dtype), {dlpack::kHost, 0}};
}

// Ctrl-C reaches a rank that waits for its peers. A signal ends the nap of the thread that it comes to, which
// then asks at once. A signal that came between two naps is found a second later: asking takes the GIL, which
// another thread may keep for long, and meanwhile nothing is done here for the peers.
bool interrupted(bool signalled) {
  constexpr double kBetween = 1.0;
  static double asked = 0;  // the main thread's
  if (!python::on_main_thread()) return false;
  if (Interrupt::is_kept()) return true;
  const double now = monotonic_seconds();
  if (!signalled && now - asked < kBetween) return false;
  asked = now;
  py::gil_scoped_acquire gil;
  return Interrupt::ask();
}

template <class... Arguments>
void set_error(const char* type, const Arguments&... arguments) {
  const python::WayBack::InPython here;
  const py::object cls = py::module_::import("commlib.errors").attr(type);
  PyErr_SetObject(cls.ptr(), cls(arguments...).ptr());
}

void set_timeout_error(const char* text, const Failure& failure) {
  set_error("PeerTimeout", text, failure.rank, failure.peers(), name_of(failure.record.op),
            name_of(failure.record.phase), failure.record.epoch);
}

const char* error_type(Cause cause) {
  switch (cause) {
    case Cause::mismatch:
      return "CallMismatch";
    case Cause::broken:
    case Cause::malformed:
    case Cause::overlap:
      return "CommError";
    default:
      return "PeerTimeout";
  }
}

void translate(std::exception_ptr p) {
  try {
    if (p) std::rethrow_exception(p);
  } catch (const CommFailure& e) {
    if (e.failure.record.cause == Cause::interrupted && Interrupt::restore()) return;
    const std::string type = error_type(e.failure.record.cause);
    type == "PeerTimeout" ? set_timeout_error(e.what(), e.failure) : set_error(type.c_str(), e.what());
  } catch (const Interrupted&) {
    if (!Interrupt::restore()) PyErr_SetNone(PyExc_KeyboardInterrupt);
  } catch (const CapacityError& e) {
    set_error("CapacityExceeded", e.what(), e.rank, e.rows);
  } catch (const SlotError& e) {
    set_error("HandleError", e.what());
  }
}

Key key_of(const std::string& bytes) {
  Key key;
  if (bytes.size() != key.size()) throw std::invalid_argument("a key has 16 bytes");
  std::memcpy(key.data(), bytes.data(), key.size());
  return key;
}

// keys: by rank, what messages to it show, and what those from it must show.
void use_ucx(Config& c, const std::vector<std::pair<std::string, std::string>>& keys, bool loopback) {
  for (const auto& [shown, expected] : keys) c.net.keys.push_back({key_of(shown), key_of(expected)});
  c.net.make_transport = [size = c.size, options = UcxOptions{c.stream != 0, loopback}] {
    return make_ucx_transport(size, options);
  };
}

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

py::object experts_of(const Placement& placement, int64_t rank) {
  if (rank < 0 || rank >= placement.ranks) {
    throw py::index_error("rank " + std::to_string(rank) + " of " + std::to_string(placement.ranks));
  }
  const auto range = py::handle(reinterpret_cast<PyObject*>(&PyRange_Type));
  return range(placement.first_expert(rank), placement.first_expert(rank + 1));
}

std::vector<int> owners(const Placement& placement) {
  std::vector<int> by_expert;
  for (int64_t e = 0; e < placement.experts; ++e) by_expert.push_back(placement.owner(e));
  return by_expert;
}

void bind_structs(py::module_& m) {
  py::class_<Placement>(m, "Placement")
      .def(py::init(&placement_of), py::arg("experts"), py::arg("ranks"))
      .def("experts_of", &experts_of, py::arg("rank"))
      .def_property_readonly("owners", &owners);

  py::enum_<DType>(m, "DType")
      .value("bf16", DType::bf16)
      .value("f16", DType::f16)
      .value("f32", DType::f32)
      .value("f64", DType::f64);

  py::class_<SpinPolicy>(m, "SpinPolicy")
      .def(py::init([](int pauses, int yields) { return SpinPolicy{pauses, yields}; }), py::arg("pauses"),
           py::arg("yields"));

  py::class_<NetConfig>(m, "NetConfig")
      .def_readwrite("node_of", &NetConfig::node_of)
      .def_readwrite("hierarchical", &NetConfig::hierarchical)
      .def_readwrite("chunk_bytes", &NetConfig::chunk_bytes)
      .def_readwrite("chunks", &NetConfig::chunks);

  py::class_<Team, std::shared_ptr<Team>>(m, "Team")
      .def(py::init<>())
      .def_property_readonly("has_given_up", py::cpp_function(&Team::has_given_up, NoGil()));

  py::class_<Config>(m, "Config")
      .def(py::init([] {
        Config c;
        c.interrupted = interrupted;
        c.let_go = HeldObject::let_go_now;
        return c;
      }))
      .def_readwrite("rank", &Config::rank)
      .def_readwrite("size", &Config::size)
      .def_readwrite("experts", &Config::experts)
      .def_readwrite("hidden", &Config::hidden)
      .def_readwrite("topk", &Config::topk)
      .def_readwrite("max_tokens", &Config::max_tokens)
      .def_readwrite("capacity", &Config::capacity)
      .def_readwrite("dtype", &Config::dtype)
      .def_readwrite("slots", &Config::slots)
      .def_readwrite("num_sms", &Config::num_sms)
      .def_readwrite("timeout", &Config::timeout)
      .def_readwrite("link_gbps", &Config::link_gbps)
      .def_readwrite("net", &Config::net)
      .def_readwrite("team", &Config::team)
      .def("use_ucx", &use_ucx, py::arg("keys"), py::arg("loopback"))
      .def_readwrite("spin", &Config::spin)
      .def_readwrite("vector_ops", &Config::vector_ops)
      .def_readwrite("cores", &Config::cores)
      .def_readwrite("first_epoch", &Config::first_epoch)
      .def_readwrite("device", &Config::device)
      .def_readwrite("stream", &Config::stream)
      .def_readwrite("plan_stream", &Config::plan_stream)
      .def_readwrite("share", &Config::share);

  py::class_<RowFormat>(m, "RowFormat")
      .def(py::init<>())
      .def(py::init([](uint16_t type, int64_t bytes, int64_t scale_bytes) {
             return RowFormat{type, bytes, scale_bytes};
           }),
           py::arg("type"), py::arg("bytes"), py::arg("scale_bytes") = 0)
      .def_property_readonly("is_own", &RowFormat::is_own);

  py::class_<Rows>(m, "Rows").def(
      py::init([](Address x, int64_t stride, int64_t count, bool has_weights, Address weights, Address scales,
                  int64_t scales_stride, const RowFormat& format) {
        return Rows{at<std::byte>(x),      stride,        count, has_weights, at<std::byte>(weights),
                    at<std::byte>(scales), scales_stride, format};
      }),
      py::arg("x"), py::arg("stride"), py::arg("count"), py::arg("has_weights"), py::arg("weights"),
      py::arg("scales") = 0, py::arg("scales_stride") = 0, py::arg("format") = RowFormat{});

  py::class_<RoutePlan>(m, "RoutePlan")
      .def(py::init([](Address topk_idx, Address routes, int64_t tokens, int64_t rows, Address expand_to,
                       Address offsets, Address rows_per_expert, int64_t align) {
             return RoutePlan{
                 at<int64_t>(topk_idx), at<int64_t>(routes),          tokens, rows, at<int64_t>(expand_to),
                 at<int64_t>(offsets),  at<int64_t>(rows_per_expert), align};
           }),
           py::arg("topk_idx"), py::arg("routes"), py::arg("tokens"), py::arg("rows") = 0,
           py::arg("expand_to") = 0, py::arg("offsets") = 0, py::arg("rows_per_expert") = 0,
           py::arg("align") = 1)
      .def(
          "complete",
          [](RoutePlan& plan, int64_t rows, Address expand_to) {
            plan.rows = rows;
            plan.expand_to = at<int64_t>(expand_to);
          },
          py::arg("rows"), py::arg("expand_to"));

  py::class_<Received>(m, "Received")
      .def(py::init([](std::optional<Address> rows, Address weights, Address topk_idx, Address source,
                       Address scales) {
             return Received{at<std::byte>(rows.value_or(0)),
                             !rows,
                             at<std::byte>(weights),
                             at<int64_t>(topk_idx),
                             at<int64_t>(source),
                             at<std::byte>(scales)};
           }),
           py::arg("rows").none(true), py::arg("weights"), py::arg("topk_idx") = 0, py::arg("source") = 0,
           py::arg("scales") = 0);

  py::class_<CombineInput>(m, "CombineInput")
      .def(
          py::init([](Address y, int64_t stride, Address weights, bool has_weight_grads, Address weight_grads,
                      Address bias, int64_t bias_stride, const RowFormat& format, DType dtype) {
            return CombineInput{at<std::byte>(y),
                                stride,
                                at<std::byte>(weights),
                                has_weight_grads,
                                at<std::byte>(weight_grads),
                                at<std::byte>(bias),
                                bias_stride,
                                format,
                                dtype};
          }),
          py::arg("y"), py::arg("stride"), py::arg("weights"), py::arg("has_weight_grads"),
          py::arg("weight_grads"), py::arg("bias"), py::arg("bias_stride"), py::arg("format") = RowFormat{},
          py::arg("dtype") = DType::bf16);

  py::class_<PendingDispatch>(m, "PendingDispatch")
      .def_readonly("rows", &PendingDispatch::rows)
      .def_readonly("results", &PendingDispatch::results)
      .def_property_readonly("dropped", [](const PendingDispatch& d) { return d.plan.dropped; })
      .def_readonly("lease", &PendingDispatch::lease);

  py::class_<SlotLease, std::shared_ptr<SlotLease>>(m, "SlotLease");
  py::class_<Job, std::shared_ptr<Job>>(m, "Ticket")
      .def_property_readonly("done", [](const Job& job) { return job.done.load(std::memory_order_acquire); })
      .def_readonly("begun", &Job::begun)
      .def_readonly("ended", &Job::ended);
  py::class_<Memory>(m, "Memory")
      .def("__dlpack__", [](const Memory& self, py::kwargs) { return to_dlpack(self); })
      .def("__dlpack_device__",
           [](const Memory& m) { return py::make_tuple(int{m.device.type}, int{m.device.id}); });
}

void bind_communicator(py::module_& m) {
  py::class_<Communicator, Owned<Communicator>>(m, "Communicator")
      .def("address",
           [](Communicator& c) {
             const PeerAddress a = c.address();
             return py::make_tuple(a.pid, a.fd, a.workers, py::bytes(a.handle), py::bytes(a.net));
           })
      .def("connect",
           [](Communicator& c,
              const std::vector<std::tuple<int64_t, int, int, std::string, std::string>>& peers) {
             std::vector<PeerAddress> addresses;
             for (const auto& [pid, fd, workers, handle, net] : peers)
               addresses.push_back({pid, fd, workers, handle, net});
             ReleasedGil released;
             c.connect(addresses);
           })
      .def("begin_dispatch", &Communicator::begin_dispatch, py::arg("routing"), py::arg("has_weights"),
           py::arg("drop"), py::arg("in_waves"), py::arg("caller") = 0, py::arg("format") = RowFormat{},
           NoGil())
      .def(
          "finish_dispatch",
          [](Communicator& c, PendingDispatch& pending, const Rows& rows, const RoutePlan& routing,
             const Received& received, bool async_op, py::object keep) {
            Held held = HeldObject::hold(std::move(keep));
            ReleasedGil released;
            return c.finish_dispatch(pending, rows, routing, received, async_op, std::move(held));
          },
          py::arg("pending"), py::arg("rows"), py::arg("routing"), py::arg("received"), py::arg("async_op"),
          py::arg("keep"))
      .def(
          "redispatch",
          [](Communicator& c, const Rows& rows, const RoutePlan& routing, const Received& received,
             bool async_op, py::object keep, uint8_t caller) {
            Held held = HeldObject::hold(std::move(keep));
            std::shared_ptr<SlotLease> lease;
            Ticket ticket;
            {
              ReleasedGil released;
              ticket = c.redispatch(rows, routing, received, async_op, &lease, std::move(held), caller);
            }
            return py::make_tuple(ticket, lease);
          },
          py::arg("rows"), py::arg("routing"), py::arg("received"), py::arg("async_op"), py::arg("keep"),
          py::arg("caller") = 0)
      .def(
          "combine",
          [](Communicator& c, const CombineInput& input, const RoutePlan& routing, Address out,
             Address out_weights, bool async_op, py::object keep, uint8_t caller) {
            Held held = HeldObject::hold(std::move(keep));
            ReleasedGil released;
            return c.combine(input, routing, at<std::byte>(out), at<std::byte>(out_weights), async_op,
                             std::move(held), caller);
          },
          py::arg("input"), py::arg("routing"), py::arg("out"), py::arg("out_weights"), py::arg("async_op"),
          py::arg("keep"), py::arg("caller") = 0)
      .def("wait", &Communicator::wait, NoGil())
      .def("wait_expert", &Communicator::wait_expert, py::arg("dispatch"), py::arg("ticket").none(true),
           py::arg("expert"), py::arg("stream"), NoGil())
      .def("wait_event", &Communicator::wait_event, py::arg("event"), NoGil())
      .def("synchronize", &Communicator::synchronize, NoGil())
      .def("check_health", &Communicator::check_health, NoGil())
      .def_property_readonly("is_usable", py::cpp_function(&Communicator::is_usable, NoGil()))
      .def("note_uses", &Communicator::note_uses, py::arg("addresses"), py::arg("stream"), NoGil())
      .def("lend_slot", &Communicator::lend_slot, NoGil())
      .def(
          "view",
          [](const Communicator& c, std::shared_ptr<SlotLease> lease, int64_t rows, const RowFormat& format,
             bool scales) { return view_of(std::move(lease), rows, format, scales, c); },
          py::arg("lease"), py::arg("rows"), py::arg("format") = RowFormat{}, py::arg("scales") = false)
      .def("close", &Communicator::close, NoGil())
      .def("give_up", &Communicator::give_up, NoGil())
      .def("set_timeout", &Communicator::set_timeout)
      .def_property_readonly("plan_stream", &Communicator::plan_stream)
      .def_property_readonly("slots_in_use", py::cpp_function(&Communicator::slots_in_use, NoGil()))
      .def_property_readonly("slot_bytes", [](const Communicator& c) { return c.layout().bytes(); })
      .def_property_readonly("heap_bytes", &Communicator::heap_bytes)
      .def_property_readonly("touched_bytes", py::cpp_function(&Communicator::touched_bytes, NoGil()))
      .def("has_exited", &Communicator::has_exited)
      .def_property_readonly("network_memory",
                             [](const Communicator& c) { return c.network() ? c.network()->bytes() : 0; })
      .def_property_readonly("network_sent",
                             [](const Communicator& c) {
                               const Network* n = c.network();
                               return n ? std::pair(n->messages_sent(), n->bytes_sent())
                                        : std::pair<uint64_t, uint64_t>(0, 0);
                             })
      .def_property_readonly("network_refused", [](const Communicator& c) {
        return c.network() ? c.network()->messages_refused() : 0;
      });

  py::class_<CpuCommunicator, Communicator, Owned<CpuCommunicator>>(m, "CpuCommunicator")
      .def(py::init<const Config&>(), NoGil())
      .def("new_rows", &new_rows, NoGil())
      .def("bare_send", &CpuCommunicator::bare_send, NoGil())
      .def(
          "bare_pull",
          [](CpuCommunicator& c, const RoutePlan& routing, Address out) {
            c.bare_pull(routing, at<std::byte>(out));
          },
          NoGil())
      .def_property_readonly("vector_ops", &CpuCommunicator::vector_ops_name)
      .def_property_readonly("idle_bytes", &CpuCommunicator::idle_bytes);
}

// The data path by itself, for tests of the vector widths against each other.
void bind_vector_ops(py::module_& m) {
  m.def("available_vector_ops", &available_vector_ops);
  m.def("multicast",
        [](const std::string& name, const std::vector<Address>& dst, Address src, int64_t bytes) {
          std::vector<std::byte*> to;
          for (Address a : dst) to.push_back(at<std::byte>(a));
          vector_ops(name).multicast(to.data(), static_cast<int>(to.size()), at<std::byte>(src), bytes);
          vector_ops(name).flush();
        });
  m.def("reduce", [](const std::string& name, DType dtype, Address dst, const std::vector<Address>& src,
                     const std::vector<Address>& weights, int64_t elements) {
    std::vector<Term> terms;
    for (size_t j = 0; j < src.size(); ++j) {
      terms.push_back({at<std::byte>(src[j]), weights.empty() ? nullptr : at<std::byte>(weights[j])});
    }
    vector_ops(name).reduce[static_cast<int>(dtype)](at<std::byte>(dst), terms.data(),
                                                     static_cast<int>(terms.size()), elements);
    vector_ops(name).flush();
  });
}

}  // namespace
}  // namespace commlib

PYBIND11_MODULE(_core, m) {
  m.doc() = "commlib's C++ core: the CPU backend. Takes addresses; shapes and types are checked in Python.";
  m.attr("MAX_RANKS") = commlib::kMaxRanks;
  m.attr("MAX_TOPK") = commlib::kMaxTopk;
  m.attr("MAX_SLOTS") = commlib::kMaxSlots;
  m.def("load_ucx", &commlib::load_ucx, pybind11::arg("paths"));
  pybind11::register_exception_translator(commlib::translate);
  m.def("close_way_back", &commlib::python::WayBack::close);
  m.def("when_gone", &commlib::python::LastCall::when_gone);
  commlib::bind_structs(m);
  commlib::bind_communicator(m);
  commlib::bind_vector_ops(m);
}
