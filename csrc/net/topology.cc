#include "net/topology.h"

#include <algorithm>
#include <map>

#include "base/rank_mask.h"
#include "net/net_config.h"

namespace commlib {
namespace {

using Nodes = std::map<int, std::vector<int>>;  // ranks of each node, ascending

// The rank of `node` through which `source` reaches the node's ranks: the one with the same index in its
// node, so that every rank of a node is gateway for its share of the sources.
int gateway_for(const Nodes& nodes, const std::vector<int>& node_of, int source, int node) {
  const std::vector<int>& home = nodes.at(node_of[source]);
  const std::vector<int>& there = nodes.at(node);
  const auto index = std::find(home.begin(), home.end(), source) - home.begin();
  return there[static_cast<size_t>(index) % there.size()];
}

std::vector<Topology::Peer> gateways_of(const Nodes& nodes, int size, const NetConfig& config, int source) {
  std::vector<Topology::Peer> gateways;
  for (int p = 0; p < size; ++p) {
    const int node = config.node_of[p];
    if (node == config.node_of[source]) continue;
    if (!config.hierarchical) {
      gateways.push_back({p, bit_of(p)});
    } else if (nodes.at(node).front() == p) {
      uint64_t serves = 0;
      for (int q : nodes.at(node)) serves |= bit_of(q);
      gateways.push_back({gateway_for(nodes, config.node_of, source, node), serves});
    }
  }
  return gateways;
}

}  // namespace

Topology Topology::of(int rank, int size, const NetConfig& config) {
  Topology t{};
  t.gateway_of.assign(size, -1);
  if (config.node_of.empty()) {
    t.near = first_ranks(size);
    return t;
  }
  Nodes nodes;
  for (int p = 0; p < size; ++p) nodes[config.node_of[p]].push_back(p);
  for (int p : nodes.at(config.node_of[rank])) t.near |= bit_of(p);
  t.served = config.hierarchical ? t.near : bit_of(rank);
  t.gateways = gateways_of(nodes, size, config, rank);
  for (size_t g = 0; g < t.gateways.size(); ++g) {
    for (int p = 0; p < size; ++p) {
      if (has(t.gateways[g].serves, p)) t.gateway_of[p] = static_cast<int>(g);
    }
  }
  for (int p = 0; p < size; ++p) {
    t.brought_by.push_back(!config.hierarchical || has(t.near, p)
                               ? p
                               : gateway_for(nodes, config.node_of, p, config.node_of[rank]));
  }
  std::vector<int> channels(size);
  for (int s = 0; s < size; ++s) {
    for (const Peer& g : gateways_of(nodes, size, config, s)) {
      if (g.rank == rank) t.sources.push_back(s);
      t.served_most = std::max(t.served_most, count_bits(g.serves));
      ++channels[s];
      ++channels[g.rank];
    }
  }
  t.channels_most = *std::max_element(channels.begin(), channels.end());
  return t;
}

}  // namespace commlib
