// Communicators of one process, connected without threads of their own.
#pragma once

#include <memory>
#include <vector>

#include "cpp/backend.h"

namespace commlib::testing {

using Communicators = std::vector<std::unique_ptr<Communicator>>;

inline Communicators connected(Machine& machine, const Config& config) {
  Communicators ranks;
  std::vector<PeerAddress> addresses;
  for (int rank = 0; rank < config.size; ++rank) {
    Config mine = config;
    mine.rank = rank;
    ranks.push_back(machine.communicator(mine));
    addresses.push_back(ranks.back()->address());
  }
  for (const auto& comm : ranks) comm->connect(addresses);
  return ranks;
}

}  // namespace commlib::testing
