// What a network is made from. It knows no backend.
#pragma once

#include <cstdint>
#include <vector>

#include "base/waiting.h"
#include "net/transport.h"

namespace commlib {

// What the user says about ranks on other nodes.
struct NetConfig {
  std::vector<int> node_of;             // by rank; empty: all share one node
  bool hierarchical = true;             // one gateway for each node, or each rank its own
  int64_t chunk_bytes = 0, chunks = 0;  // of rings; 0: what suits
  TransportFactory make_transport;
  std::vector<PeerKeys> keys;  // by rank
};

// What a communicator is to the network that it makes.
struct NetShape {
  int rank, size;
  int64_t control_bytes;  // of a rank's control block
  int64_t count_words;    // of one source, in it
  int64_t topk, row_bytes, weight_bytes;
  SpinPolicy spin;
};

}  // namespace commlib
