// Messages over UCX: RDMA, RoCE, TCP or shared memory, whatever UCX finds between two nodes.
//
// Chunks are active messages, not puts: the receiver says where bytes go when a message announces itself, so
// UCX may choose for each path between sending at once (TCP) and fetching by RDMA, and copies what is in a
// GPU's memory through the host where nothing can read it directly; and completion at the receiver is one
// call, with no flags that a network would have to order behind data. See docs/decisions/nodes.md.
#pragma once

#include <string>
#include <vector>

#include "net/transport.h"

namespace commlib {

// Loads UCX from the first of `paths` that loads; "libucp.so.0" is the library that the system finds. The
// library stays loaded. Returns its version; throws std::runtime_error with what went wrong with each.
std::string load_ucx(const std::vector<std::string>& paths);

struct UcxOptions {
  bool device_memory;  // rings lie in a GPU's memory, if UCX reaches it
  bool loopback;       // all ranks share network interfaces: UCX need listen on loopback only
};
std::unique_ptr<Transport> make_ucx_transport(int size, UcxOptions options);

}  // namespace commlib
