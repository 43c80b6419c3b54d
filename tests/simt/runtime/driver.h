// The driver's functions that csrc/cuda/ looks up by name.
#pragma once

namespace simt {

void* driver_function(const char* name);  // null: there is none of this name

}  // namespace simt
