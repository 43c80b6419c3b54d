// A rank's communicator: the operations, and what one can ask of it.
#include "bindings/bindings.h"
#include "bindings/memory.h"
#include "cpu/pool.h"
#include "net/network.h"

namespace commlib::python {
namespace {

using Bound = py::class_<Communicator, Owned<Communicator>>;
using TicketOrNone = std::optional<Ticket>;  // a null ticket is None, too; this says so in stubs
using AddressTuple = std::tuple<int64_t, int, int, py::bytes, py::bytes>;

AddressTuple address(Communicator& c) {
  const PeerAddress a = c.address();
  return {a.pid, a.fd, a.workers, py::bytes(a.handle), py::bytes(a.net)};
}

void connect(Communicator& c, const std::vector<AddressTuple>& peers) {
  std::vector<PeerAddress> addresses;
  for (const auto& [pid, fd, workers, handle, net] : peers)
    addresses.push_back({pid, fd, workers, handle, net});
  const ReleasedGil released;
  c.connect(addresses);
}

TicketOrNone finish_dispatch(Communicator& c, PendingDispatch& pending, const Rows& rows,
                             const RoutePlan& routing, const Received& received, bool async_op,
                             py::object keep) {
  Held held = HeldObject::hold(std::move(keep));
  const ReleasedGil released;
  return c.finish_dispatch(pending, rows, routing, received, async_op, std::move(held));
}

std::pair<TicketOrNone, std::shared_ptr<SlotLease>> dispatch_bounded(Communicator& c, const Rows& rows,
                                                                     const RoutePlan& routing,
                                                                     const Received& received, bool drop,
                                                                     bool async_op, py::object keep,
                                                                     uint8_t caller) {
  Held held = HeldObject::hold(std::move(keep));
  std::shared_ptr<SlotLease> lease;
  const ReleasedGil released;
  const Ticket ticket =
      c.dispatch_bounded(rows, routing, received, drop, async_op, &lease, std::move(held), caller);
  return {ticket, lease};
}

std::pair<TicketOrNone, std::shared_ptr<SlotLease>> redispatch(Communicator& c, const Rows& rows,
                                                               const RoutePlan& routing,
                                                               const Received& received, bool async_op,
                                                               py::object keep, uint8_t caller) {
  Held held = HeldObject::hold(std::move(keep));
  std::shared_ptr<SlotLease> lease;
  const ReleasedGil released;
  const Ticket ticket = c.redispatch(rows, routing, received, async_op, &lease, std::move(held), caller);
  return {ticket, lease};
}

TicketOrNone combine(Communicator& c, const CombineInput& input, const RoutePlan& routing, Address out,
                     Address out_weights, bool async_op, py::object keep, uint8_t caller) {
  Held held = HeldObject::hold(std::move(keep));
  const ReleasedGil released;
  return c.combine(input, routing, at<std::byte>(out), at<std::byte>(out_weights), async_op, std::move(held),
                   caller);
}

void wait_expert(Communicator& c, const PendingDispatch& dispatch, const TicketOrNone& ticket, int64_t expert,
                 uintptr_t stream) {
  c.wait_expert(dispatch, ticket.value_or(nullptr), expert, stream);
}

std::pair<uint64_t, uint64_t> network_sent(const Communicator& c) {
  const Network* n = c.network();
  return n ? std::pair(n->messages_sent(), n->bytes_sent()) : std::pair<uint64_t, uint64_t>(0, 0);
}

void bind_operations(Bound& bound) {
  bound
      .def("begin_dispatch", &Communicator::begin_dispatch, "routing"_a, "has_weights"_a, "drop"_a,
           "in_waves"_a, "grouped_in_slot"_a = false, "caller"_a = 0, format_arg(), NoGil(),
           R"(Plan, and learn how many rows come.

Fills in routes, rows_per_expert and offsets.

Raises:
    ValueError: an expert id that there is not, or a format for which slots have no room.
    CapacityExceeded: on all ranks alike, unless `drop`.)")
      .def("finish_dispatch", &finish_dispatch, "pending"_a, "rows"_a, "routing"_a, "received"_a,
           "async_op"_a, "keep"_a,
           "Move the rows. Keeps `keep` until they have moved; None: a stream orders what comes after.")
      .def("dispatch_bounded", &dispatch_bounded, "rows"_a, "routing"_a, "received"_a, "drop"_a, "async_op"_a,
           "keep"_a, "caller"_a = 0, "Plan and move the rows, without waiting for how many come.")
      .def("redispatch", &redispatch, "rows"_a, "routing"_a, "received"_a, "async_op"_a, "keep"_a,
           "caller"_a = 0, "Move the rows of other tensors along a known routing.")
      .def("combine", &combine, "input"_a, "routing"_a, "out"_a, "out_weights"_a, "async_op"_a, "keep"_a,
           "caller"_a = 0)
      .def("wait", &Communicator::wait, "ticket"_a, NoGil())
      .def("wait_expert", &wait_expert, "dispatch"_a, "ticket"_a, "expert"_a, "stream"_a, NoGil(),
           "Of a dispatch in waves: wait for the rows of one of this rank's experts.")
      .def("wait_event", &Communicator::wait_event, "event"_a, NoGil(),
           "CUDA: wait for an event of the communication stream.")
      .def("synchronize", &Communicator::synchronize, NoGil(), "Wait for all operations issued.")
      .def("lend_slot", &Communicator::lend_slot, "once"_a, NoGil(),
           "A slot to write rows for a combine into; once: good for one, after which nothing is written "
           "there.")
      .def("view", &view_of, "lease"_a, "rows"_a, format_arg(), "scales"_a = false,
           "Rows in a slot, or their scales; as bytes where they are not the communicator's own.")
      .def("note_uses", &Communicator::note_uses, "addresses"_a, "stream"_a, NoGil(),
           "CUDA: `stream` may still use the tensors at these addresses when they go.");
}

std::optional<std::tuple<std::string, std::vector<int>>> absence_of(Communicator& comm, int rank,
                                                                    bool departed_too) {
  const Absence absence = comm.absence_of(rank, departed_too);
  if (!absence.why) return std::nullopt;
  return {{absence.why, ranks_in(absence.blamed)}};
}

void give_up(Communicator& comm, const std::string& why, const std::vector<int>& blamed) {
  uint64_t ranks = 0;
  for (const int p : blamed) ranks |= p >= 0 && p < comm.config().size ? bit_of(p) : 0;
  comm.give_up(why, ranks ? ranks : bit_of(comm.config().rank));
}

void bind_life(Bound& bound) {
  bound.def("address", &address, "What the other ranks need to connect.")
      .def("connect", &connect, "peers"_a, "Map the heaps of the others, whose addresses these are by rank.")
      .def("check_health", &Communicator::check_health, NoGil(), "Raise what has failed. Does not wait.")
      .def_property_readonly("is_usable", py::cpp_function(&Communicator::is_usable, NoGil()))
      .def("absence_of", &absence_of, "rank"_a, "departed_too"_a,
           "Why a rank does nothing more (\"exited\", \"lost\" or \"departed\"), and whom to blame; or None.")
      .def("set_timeout", &Communicator::set_timeout, "seconds"_a)
      .def("give_up", &give_up, "why"_a, "blamed"_a = std::vector<int>(), NoGil(),
           "The other ranks need not wait: they are told to blame these ranks, or else this one.")
      .def("close", &Communicator::close, NoGil(), "Finish what is under way, and tell the others.");
}

void bind_facts(Bound& bound) {
  bound.def_property_readonly("plan_stream", &Communicator::plan_stream)
      .def_property_readonly("slots_in_use", py::cpp_function(&Communicator::slots_in_use, NoGil()))
      .def_property_readonly("slot_bytes", [](const Communicator& c) { return c.layout().bytes(); })
      .def_property_readonly("heap_bytes", &Communicator::heap_bytes)
      .def_property_readonly("touched_bytes", py::cpp_function(&Communicator::touched_bytes, NoGil()))
      .def_property_readonly("network_memory",
                             [](const Communicator& c) { return c.network() ? c.network()->bytes() : 0; })
      .def_property_readonly("network_sent", &network_sent, "Messages and bytes, to other nodes.")
      .def_property_readonly("network_refused", [](const Communicator& c) {
        return c.network() ? c.network()->messages_refused() : 0;
      });
}

}  // namespace

void bind_communicator(py::module_& m) {
  py::class_<Job, std::shared_ptr<Job>>(m, "Ticket", "An asynchronous operation.")
      .def_property_readonly("done", [](const Job& job) { return job.done.load(std::memory_order_acquire); })
      .def_readonly("begun", &Job::begun)
      .def_readonly("ended", &Job::ended);
  py::class_<PendingDispatch>(m, "PendingDispatch", R"(A dispatch whose counts are known.

Its rows have not moved yet or, in waves, may be moving.)")
      .def_readonly("rows", &PendingDispatch::rows, "Unique rows.")
      .def_readonly("results", &PendingDispatch::results, "Rows, or rows in groups with their padding.")
      .def_readonly("grouped_in_slot", &PendingDispatch::grouped_in_slot,
                    "They come grouped by expert, and stay in their slot.")
      .def_property_readonly("dropped", [](const PendingDispatch& d) { return d.plan.dropped; })
      .def_readonly("lease", &PendingDispatch::lease);
  Bound bound(m, "Communicator", "One rank of an expert-parallel group.");
  bind_operations(bound);
  bind_life(bound);
  bind_facts(bound);
}

}  // namespace commlib::python
