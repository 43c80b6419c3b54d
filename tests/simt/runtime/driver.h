// The driver's functions that csrc/cuda/ looks up by name.
#pragma once

namespace simt {

// Whether memory with fabric handles can be made. Every device says that it can, as Hopper does.
extern bool has_imex;

void* driver_function(const char* name);  // null: there is none of this name

}  // namespace simt
