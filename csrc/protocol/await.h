// Waiting for several ranks.
#pragma once

#include "protocol/internode/endpoints.h"
#include "protocol/worker.h"

namespace commlib {

// Waits until ready(p) holds of every rank of `ranks`. Each lane waits for ranks of its own; all() passes on
// what they have seen.
template <class Worker, class Ready>
COMMLIB_HD bool await_ranks(Worker& w, const PeerTable& peers, uint64_t ranks, Phase phase, Ready ready) {
  const auto late = [&] {
    uint64_t by = 0;
    for (uint64_t left = ranks; left; left &= left - 1) {
      const int p = lowest_bit(left);
      if (!ready(p)) by |= bit_of(brought_by(peers, p));
    }
    return by;
  };
  bool ok = true;
  for (int p = w.lane(); ok && p < peers.size; p += w.lanes()) {
    if (has(ranks, p)) ok = w.await([&] { return ready(p); }, p, late, phase);
  }
  return w.all(ok);
}

}  // namespace commlib
