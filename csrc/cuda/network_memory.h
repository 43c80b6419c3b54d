// Memory of a GPU's channels to other nodes: device memory, and mapped memory of the host.
#pragma once

#include <memory>

#include "net/network.h"

namespace commlib::cuda {

// control: the rank's control block, in device memory.
std::unique_ptr<NetworkMemory> gpu_network_memory(int device, std::byte* control);

}  // namespace commlib::cuda
