// How a rank tells another what it has written into the words it has there.
#pragma once

#include "protocol/hops.h"

namespace commlib {

// A rank on another node gets words [first, first + n) of what is written here for it.
template <class Worker>
COMMLIB_HD void ship_words(Worker& w, const PeerTable& peers, int p, const uint64_t* first, int64_t n) {
  const auto* block = reinterpret_cast<const std::byte*>(peers.peer[p].mail);
  const auto offset = static_cast<uint64_t>(reinterpret_cast<const std::byte*>(first) - block);
  w.post(peers.hops->outbox, {PostKind::words, Stream::outward, 0, p, offset, static_cast<uint64_t>(n) * 8});
}

// Rank p is to see the words from `first` on, which all lanes have written.
template <class Worker>
COMMLIB_HD void tell(Worker& w, const PeerTable& peers, int p, const uint64_t* first, int64_t n) {
  if (peers.is_near(p)) return w.wake(peers.mail_to(p));
  w.all(true);
  if (w.lane() == 0) ship_words(w, peers, p, first, n);
}

}  // namespace commlib
