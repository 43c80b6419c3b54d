#include "net/topology.h"

#include <algorithm>
#include <map>

#include "backend/communicator.h"

namespace commlib {
namespace {

using Nodes = std::map<int, std::vector<int>>;  // ranks of each node, ascending

// The rank of `node` through which `source` reaches its ranks. That with the same place in its node, so that
// every rank of a node is gateway for its share of the sources.
int gateway_for(const Nodes& nodes, const std::vector<int>& node_of, int source, int node) {
  const std::vector<int>& home = nodes.at(node_of[source]);
  const std::vector<int>& there = nodes.at(node);
  const auto place = std::find(home.begin(), home.end(), source) - home.begin();
  return there[static_cast<size_t>(place) % there.size()];
}

std::vector<Topology::Peer> gateways_of(const Nodes& nodes, const Config& config, int source) {
  std::vector<Topology::Peer> gateways;
  for (int p = 0; p < config.size; ++p) {
    const int node = config.node_of[p];
    if (node == config.node_of[source]) continue;
    const uint64_t self = uint64_t{1} << p;
    if (!config.hierarchical) {
      gateways.push_back({p, self});
    } else if (nodes.at(node).front() == p) {
      uint64_t serves = 0;
      for (int q : nodes.at(node)) serves |= uint64_t{1} << q;
      gateways.push_back({gateway_for(nodes, config.node_of, source, node), serves});
    }
  }
  return gateways;
}

}  // namespace

Topology Topology::of(const Config& config) {
  Topology t{};
  t.gateway_of.assign(config.size, -1);
  if (config.node_of.empty()) {
    t.near = config.size == 64 ? ~uint64_t{0} : (uint64_t{1} << config.size) - 1;
    return t;
  }
  Nodes nodes;
  for (int p = 0; p < config.size; ++p) nodes[config.node_of[p]].push_back(p);
  for (int p : nodes.at(config.node_of[config.rank])) t.near |= uint64_t{1} << p;
  t.served = config.hierarchical ? t.near : uint64_t{1} << config.rank;
  t.gateways = gateways_of(nodes, config, config.rank);
  for (size_t g = 0; g < t.gateways.size(); ++g) {
    for (int p = 0; p < config.size; ++p) {
      if (t.gateways[g].serves >> p & 1) t.gateway_of[p] = static_cast<int>(g);
    }
  }
  for (int p = 0; p < config.size; ++p) {
    t.brought_by.push_back(!config.hierarchical || t.near >> p & 1
                               ? p
                               : gateway_for(nodes, config.node_of, p, config.node_of[config.rank]));
  }
  std::vector<int> channels(config.size);
  for (int s = 0; s < config.size; ++s) {
    for (const Peer& g : gateways_of(nodes, config, s)) {
      if (g.rank == config.rank) t.sources.push_back(s);
      t.served_most = std::max(t.served_most, __builtin_popcountll(g.serves));
      ++channels[s];
      ++channels[g.rank];
    }
  }
  t.channels_most = *std::max_element(channels.begin(), channels.end());
  return t;
}

}  // namespace commlib
