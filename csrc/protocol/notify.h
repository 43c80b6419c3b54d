// How a rank makes another see the words that it has written for it.
#pragma once

#include "protocol/internode/endpoints.h"

namespace commlib {

// Sends words [first, first + n) of what is written here for a rank on another node.
template <class Worker>
COMMLIB_HD void send_words(Worker& w, const PeerTable& peers, int p, const uint64_t* first, int64_t n) {
  const auto* block = reinterpret_cast<const std::byte*>(peers.peer[p].signals);
  const auto offset = static_cast<uint64_t>(reinterpret_cast<const std::byte*>(first) - block);
  w.post(peers.internode->outbox,
         {PostKind::words, Direction::outward, 0, p, offset, static_cast<uint64_t>(n) * 8});
}

// Makes rank p see the n words from `first` on, which all lanes have written.
template <class Worker>
COMMLIB_HD void notify(Worker& w, const PeerTable& peers, int p, const uint64_t* first, int64_t n) {
  if (peers.is_near(p)) return w.notify(peers.signals_to(p));
  w.all(true);
  if (w.lane() == 0) send_words(w, peers, p, first, n);
}

}  // namespace commlib
