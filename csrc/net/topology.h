// Which ranks share a node, and which is whose gateway.
#pragma once

#include <cstdint>
#include <vector>

namespace commlib {

struct NetConfig;

struct Topology {
  uint64_t near;  // the ranks of this rank's node, as a mask

  struct Peer {
    int rank;
    uint64_t serves;
  };
  std::vector<Peer> gateways;   // those that this rank sends to, by the lowest rank they serve
  std::vector<int> sources;     // those whose gateway this rank is
  std::vector<int> gateway_of;  // by rank: an index into gateways; -1 for ranks of this node
  std::vector<int> brought_by;  // by rank, on other nodes: the rank that passes on here what comes from it
  uint64_t served;              // the ranks that this one passes rows on to
  int served_most;              // by any gateway
  int channels_most;            // outward ones that any rank has an end of; homeward there are as many

  static Topology of(int rank, int size, const NetConfig& config);
};

}  // namespace commlib
