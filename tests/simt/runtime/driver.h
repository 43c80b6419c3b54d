// The driver's functions that csrc/cuda/ looks up by name.
#pragma once

#include <vector>

namespace simt {

struct DriverFunction {
  const char* name;
  void* address;
};

template <class F>
DriverFunction named(const char* name, F* function) {
  return {name, reinterpret_cast<void*>(function)};
}

std::vector<DriverFunction> green_context_functions();

// Whether memory with fabric handles can be made. Every device says that it can, as Hopper does.
extern bool has_imex;

void* driver_function(const char* name);  // null: there is none of this name

}  // namespace simt
