// What both modules need of Python: its lock, and objects that outlive a call.
#pragma once

#include <pybind11/pybind11.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <utility>

#include "backend/communicator.h"

namespace commlib::python {

namespace py = pybind11;

// Python runs signal handlers on its main thread alone, which is that of the process.
inline bool on_main_thread() { return gettid() == getpid(); }

inline bool interpreter_ends() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Threads other than the main one on their way back to Python. Python ends a thread that takes the GIL when
// the interpreter ends, by unwinding it: through destructors, which aborts the program. So at the end of the
// program, before that, the way is closed: a thread that comes later sleeps until the process ends, and one
// that is on the way gets the GIL.
class WayBack {
 public:
  // Writes `returning_`, then reads `closed_`; close() writes `closed_`, then reads `returning_` (all
  // sequentially consistent): one of them sees the other.
  static void enter(bool has_gil = false) {
    if (on_main_thread()) return;
    returning_.fetch_add(1);
    if (!closed_.load() && !interpreter_ends()) return;
    returning_.fetch_sub(1);
    if (has_gil) PyEval_SaveThread();
    for (;;) pause();
  }
  static void leave() {
    if (!on_main_thread()) returning_.fetch_sub(1);
  }

  // Python code that C++ calls with the GIL, to make an error. It may lose the GIL in the middle.
  struct InPython {
    InPython() { enter(true); }
    ~InPython() { leave(); }
  };

  // On the main thread, with the GIL, which it lets go of meanwhile.
  static void close() {
    closed_.store(true);
    const py::gil_scoped_release released;
    while (returning_.load() != 0) usleep(100);
  }

 private:
  static inline std::atomic<int> returning_{0};
  static inline std::atomic<bool> closed_{false};
};

// Lets go of the GIL, and takes it back at the end.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    WayBack::enter();
    PyEval_RestoreThread(state_);
    WayBack::leave();
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

using NoGil = py::call_guard<ReleasedGil>;

// How Python gives up a communicator: not at all in a forked child, whose copy has no threads to join.
struct EndAtHome {
  void operator()(Communicator* comm) const {
    if (!comm->is_here()) return;
    ReleasedGil released;  // close() may wait for operations
    delete comm;
  }
};
template <class T>
using Owned = std::unique_ptr<T, EndAtHome>;

// What a signal handler raised (KeyboardInterrupt, on Ctrl-C) while C++ code waited on the main thread, until
// it is raised: by the binding, if the call ends because of it, else by the interpreter, in the code that it
// goes on with. Python's own error indicator would have to be checked after each call: what was waited for
// may come at that very moment, and then the call ends well. Belongs to the main thread, which alone runs
// handlers.
class Interrupt {
 public:
  static bool is_kept() { return kept_ != nullptr; }

  // With the GIL, like all that follows. Returns whether the user wants out.
  static bool ask() {
    if (!kept_ && PyErr_CheckSignals() != 0) keep(py::error_already_set());
    return is_kept();
  }

  static void keep(const py::error_already_set& error) {
    if (kept_) return;
    if (error.trace()) PyException_SetTraceback(error.value().ptr(), error.trace().ptr());
    kept_ = error.value().inc_ref().ptr();
    Py_AddPendingCall(&raise, nullptr);  // if there are too many, the next wait ends with it
  }

  // Makes it Python's error; returns whether there was one for this thread.
  static bool restore() {
    if (!on_main_thread()) return false;
    const auto error = py::reinterpret_steal<py::object>(std::exchange(kept_, nullptr));
    if (error) PyErr_SetObject(py::type::handle_of(error).ptr(), error.ptr());
    return static_cast<bool>(error);
  }

 private:
  static int raise(void*) { return restore() ? -1 : 0; }

  static inline PyObject* kept_ = nullptr;
};

// Calls a function when an object has gone, as weakref.finalize does. Python prints and drops what such a
// callback raises: right for an error, which no caller is left to see, but a Ctrl-C that comes while close()
// waits would be lost. The callback itself is C++: in a callback of its own, Python could look for signals
// outside of the function.
class LastCall {
 public:
  // With the GIL, like all that follows.
  static void when_gone(const py::object& object, py::function function) {
    const auto last = [function = std::move(function)](const py::handle& reference) {
      if (!interpreter_ends()) call(function);
      reference.dec_ref();
    };
    py::weakref(object, py::cpp_function(last)).release();
  }

 private:
  static void call(const py::function& function) {
    try {
      function();
    } catch (py::error_already_set& error) {
      const auto comm_error = py::module_::import("commlib.errors").attr("CommError");
      if (!on_main_thread() || error.matches(comm_error)) return error.discard_as_unraisable(function);
      // The signal may have come before the function had begun; if it has ended, nothing is left to do.
      try {
        function();
      } catch (py::error_already_set& again) {
        again.discard_as_unraisable(function);
      }
      Interrupt::keep(error);
    }
    // A signal that came meanwhile, and that no wait has asked for: the next callback may be Python's own.
    Interrupt::ask();
  }
};

// An object that an asynchronous operation uses. Communication threads give it up, and must not need the GIL,
// which Python code may keep for seconds: they put it on a list (a stack that only grows, or is taken whole),
// and threads that have the GIL let go of what is there: the main thread soon, a thread that starts an
// operation at once, and one that finds no free slot takes the GIL for it.
class HeldObject {
 public:
  // With the GIL. None: nothing to hold.
  static Held hold(py::object object) {
    let_go();
    if (object.is_none()) return nullptr;
    return Held(new HeldObject{object.release().ptr(), nullptr},
                [](void* held) { static_cast<HeldObject*>(held)->give_up(); });
  }

  // Without the GIL, which it takes.
  static void let_go_now() {
    WayBack::enter();
    const py::gil_scoped_acquire gil;
    WayBack::leave();
    let_go();
  }

  // With the GIL.
  static void let_go() {
    if (!given_up_.load(std::memory_order_relaxed)) return;
    // Acquires what give_up released.
    HeldObject* next = given_up_.exchange(nullptr, std::memory_order_acquire);
    while (next) {
      const std::unique_ptr<HeldObject> held(next);
      next = held->next_;
      Py_DECREF(held->object_);
    }
  }

 private:
  HeldObject(PyObject* object, HeldObject* next) : object_(object), next_(next) {}

  void give_up() {
    next_ = given_up_.load(std::memory_order_relaxed);
    while (!given_up_.compare_exchange_weak(next_, this, std::memory_order_release)) {
    }
    // Needs no GIL. Where its queue is full, or the interpreter has ended, the object waits for let_go.
    const bool first = next_ == nullptr;
    if (first && Py_IsInitialized() && !interpreter_ends()) Py_AddPendingCall(&let_go_soon, nullptr);
  }

  static int let_go_soon(void*) {
    let_go();
    return 0;
  }

  static inline std::atomic<HeldObject*> given_up_{nullptr};

  PyObject* object_;
  HeldObject* next_;
};

}  // namespace commlib::python
