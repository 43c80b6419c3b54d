// Which ranks are to blame for a wait that does not end. A rank that waits for another may itself be waited
// for: it may be a gateway that waits for the ranks behind it, or still be in an earlier operation. So a rank
// that has waited for half its deadline tells all ranks which ones it waits for, and so does a rank that
// reads that another waits for it; at the deadline a rank follows these words to the ranks that say nothing.
// A rank that is stopped, computes or has departed for good says nothing, and one behind a cut link is not
// heard.
#pragma once

#include "protocol/notify.h"

namespace commlib {

// Whether `peer` has reached this operation. Only the word of a later call overwrites a call word.
template <class Worker>
COMMLIB_HD bool has_called(Worker& w, const PeerTable& peers, int peer, uint32_t tag) {
  const uint64_t word = w.read(&peers.signals_from(peer).calls[tag % kCallRing].word);
  return Call::from_bits(value_of(word)).op != OpKind::none && reached(tag_of(word), tag);
}

// The newest call that `peer` told this rank of, or 0.
template <class Worker>
COMMLIB_HD uint64_t newest_call(Worker& w, const PeerTable& peers, int peer) {
  uint64_t newest = 0;
#pragma unroll 1
  for (const SaidCall& said_there : peers.signals_from(peer).calls) {
    const uint64_t v = w.read(&said_there.word);
    const bool said = Call::from_bits(value_of(v)).op != OpKind::none;
    if (said && (newest == 0 || reached(tag_of(v), tag_of(newest)))) newest = v;
  }
  return newest;
}

// The ranks that an operation waits for, and those that have not reached it.
template <class Worker>
COMMLIB_HD uint64_t late_ranks(Worker& w, const PeerTable& peers, uint32_t tag, uint64_t awaited) {
#pragma unroll 1
  for (int p = 0; p < peers.size; ++p) {
    if (p != peers.rank && !has_called(w, peers, p, tag)) awaited |= bit_of(p);
  }
  return awaited;
}

// The ranks that rank p says it waits for.
template <class Worker>
COMMLIB_HD uint64_t awaited_by(Worker& w, const PeerTable& peers, int p) {
  uint64_t ranks = 0;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const uint64_t word = w.read(&peers.signals_from(p).awaits[half]);
    if (value_of(word) != 0 && !has_called(w, peers, p, tag_of(word) + 1)) ranks |= ranks_of_half(word, half);
  }
  return ranks & peers.all();
}

template <class Worker>
COMMLIB_HD bool is_awaited(Worker& w, const PeerTable& peers) {
  const int half = peers.rank / 32;
#pragma unroll 1
  for (int p = 0; p < peers.size; ++p) {
    const uint64_t word = w.read(&peers.signals_from(p).awaits[half]);
    if (p != peers.rank && has(ranks_of_half(word, half), peers.rank)) return true;
  }
  return false;
}

// Replaces `before`, the word about this rank's waits, by `word` at all ranks, unless another worker has
// replaced it.
template <class Worker>
COMMLIB_HD void publish_awaited(Worker& w, const PeerTable& peers, int half, uint64_t before, uint64_t word) {
  if (!w.replace(&peers.signals_to(peers.rank).awaits[half], before, word)) return;
#pragma unroll 1
  for (int p = 0; p < peers.size; ++p) {
    if (p == peers.rank) continue;
    uint64_t* theirs = &peers.signals_to(p).awaits[half];
    w.publish(theirs, word);
    if (!peers.is_near(p)) send_words(w, peers, p, theirs, 1);
  }
}

// Says that this rank waits for `ranks`, besides those that it has named since its newest call; none: that it
// waits for no rank. When one wait has ended well, other workers that still wait publish theirs again.
template <class Worker>
COMMLIB_HD void publish_awaited(Worker& w, const PeerTable& peers, uint64_t ranks) {
  const uint32_t newest = ranks ? tag_of(newest_call(w, peers, peers.rank)) : 0;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const uint64_t before = w.read(&peers.signals_from(peers.rank).awaits[half]);
    const uint64_t named = ranks && tag_of(before) == newest ? ranks | ranks_of_half(before, half) : ranks;
    const uint64_t word = tagged_half(ranks ? newest : tag_of(before), named, half);
    if (word != before && (value_of(word) || value_of(before))) publish_awaited(w, peers, half, before, word);
  }
}

// The ranks to which the words of waiting ranks lead from `late`: those that say nothing. None where all wait
// for each other in a circle.
template <class Worker>
COMMLIB_HD uint64_t silent_ranks(Worker& w, const PeerTable& peers, uint64_t late) {
  uint64_t silent = late, seen = 0;
#pragma unroll 1
  while (const uint64_t next = silent & ~seen) {
    const int p = lowest_bit(next);
    seen |= bit_of(p);
    const uint64_t others = awaited_by(w, peers, p);
    if (others) silent = (silent & ~bit_of(p)) | (others & ~seen);
  }
  return silent;
}

}  // namespace commlib
