// What the files of bindings share: one binds each concept, and core.cc and cuda.cc put them into modules.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/python.h"
#include "protocol/operation.h"

namespace commlib::python {

using Address = uintptr_t;  // 0: none

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// An argument that is what its type says: nothing is converted, so that a stub says `int` or `bool`.
inline py::arg operator""_a(const char* name, size_t) { return py::arg(name).noconvert(); }

// How rows are laid out, where they are not the communicator's own.
inline py::arg_v format_arg() { return py::arg_v("format", RowFormat{}, "RowFormat()"); }

// A field to read and write, as an argument.
template <class Class, class Type>
void field(py::class_<Class>& bound, const char* name, Type Class::* member) {
  const auto set = [member](Class& self, Type value) { self.*member = std::move(value); };
  bound.def_property(
      name, [member](const Class& self) -> const Type& { return self.*member; },
      py::cpp_function(set, py::is_method(bound), "value"_a));
}

void bind_config(py::module_& m);
void bind_rows(py::module_& m);
void bind_communicator(py::module_& m);
void bind_cpu(py::module_& m);

// Whether the user wants out of a wait (Ctrl-C). `signalled`: a signal came just now.
bool interrupted(bool signalled);

}  // namespace commlib::python
