// The module commlib._core, and how waits in it end: by errors of commlib.errors, or by Ctrl-C. Bindings
// convert, release the GIL and translate errors; they have no logic.
#include <pybind11/typing.h>

#include "backend/communicator.h"
#include "base/waiting.h"
#include "bindings/bindings.h"
#include "net/ucx_transport.h"

namespace commlib::python {
namespace {

template <class... Arguments>
void set_error(const char* type, const Arguments&... arguments) {
  const WayBack::InPython here;
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

// Turns the core's errors into those of commlib.errors.
void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
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

}  // namespace

// Ctrl-C reaches a rank that waits for its peers. A signal ends the nap of the thread that it comes to, which
// then asks at once. A signal that came between two naps is found a second later: asking takes the GIL, which
// another thread may keep for long, and meanwhile nothing is done here for the peers.
bool interrupted(bool signalled) {
  constexpr double kBetween = 1.0;
  static double asked = 0;  // the main thread's
  if (!on_main_thread()) return false;
  if (Interrupt::is_kept()) return true;
  const double now = monotonic_seconds();
  if (!signalled && now - asked < kBetween) return false;
  asked = now;
  py::gil_scoped_acquire gil;
  return Interrupt::ask();
}

}  // namespace commlib::python

PYBIND11_MODULE(_core, m) {
  using namespace commlib::python;
  m.doc() = R"(commlib's C++ core: the CPU backend, and what all backends have in common.

Arguments named by address take ``tensor.data_ptr()``; shapes and types are checked in Python.)";
  m.attr("MAX_RANKS") = commlib::kMaxRanks;
  m.attr("MAX_TOPK") = commlib::kMaxTopk;
  m.attr("MAX_SLOTS") = commlib::kMaxSlots;
  py::register_exception_translator(translate);
  m.def("load_ucx", &commlib::load_ucx, py::arg("paths"),
        R"(Load UCX from the first of these that loads; its version.

Raises:
    RuntimeError: what went wrong with each.)");
  m.def("close_way_back", &WayBack::close,
        "At the end of the program: threads other than the main one that are still in the core stay there.");
  m.def(
      "when_gone",
      [](const py::object& object, py::typing::Callable<void()> function) {
        LastCall::when_gone(object, std::move(function));
      },
      py::arg("object"), py::arg("function"),
      "Call a function when an object has gone; a Ctrl-C meanwhile is not lost.");
  bind_config(m);
  bind_rows(m);
  bind_communicator(m);
  bind_cpu(m);
}
