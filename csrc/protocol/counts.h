// Counts: every rank tells every other how many rows it has for each rank, and for each of that rank's
// experts. From all counts each rank knows where its own rows begin everywhere.
#pragma once

#include "protocol/plan.h"
#include "protocol/tell.h"

namespace commlib {

COMMLIB_HD int64_t count_words(const Placement& placement) { return placement.ranks + placement.max_count(); }

// To rank p go [ranks] row counts and [experts of p] counts, each word tagged with the dispatch.
template <class Worker>
COMMLIB_HD void publish_counts(Worker& w, const PeerTable& peers, const Placement& placement,
                               const SourceCounts& counts, uint32_t dispatch) {
  for (int p = 0; p < peers.size; ++p) {
    uint64_t* words = peers.counts(p, peers.rank, dispatch);
    for (int q = w.lane(); q < peers.size; q += w.lanes()) {
      w.publish(&words[q], tagged(dispatch, counts.per_rank[q]));
    }
    const int64_t first = placement.first_expert(p);
    for (int64_t e = w.lane(); e < placement.count(p); e += w.lanes()) {
      w.publish(&words[peers.size + e], tagged(dispatch, counts.per_expert[first + e]));
    }
    tell(w, peers, p, words, peers.count_words);
  }
}

// Where rows go, from all counts.
struct CountsResult {
  int64_t* base;             // [ranks]: this rank's first row at each rank
  int64_t* received;         // [ranks]: rows each rank receives in all
  int64_t* source_rows;      // [ranks]: rows this rank receives from each source
  int64_t* rows_per_expert;  // [own experts]
};

// One count word of source s: that of rank i, or of own expert i - ranks.
COMMLIB_HD void add_count(const PeerTable& peers, const CountsResult& result, int s, int64_t i,
                          uint32_t rows) {
  if (i >= peers.size) {
    result.rows_per_expert[i - peers.size] += rows;
    return;
  }
  if (s < peers.rank) result.base[i] += rows;
  if (i == peers.rank) result.source_rows[s] = rows;
  result.received[i] += rows;
}

// Each lane takes words of its own, from every source in turn, so no two lanes add to one sum.
template <class Worker>
COMMLIB_HD bool collect_counts(Worker& w, const PeerTable& peers, const Placement& placement,
                               uint32_t dispatch, const CountsResult& result) {
  const int64_t words = peers.size + placement.count(peers.rank);
  bool ok = true;
  for (int64_t i = w.lane(); i < words; i += w.lanes()) {
    if (i < peers.size) {
      result.base[i] = result.received[i] = 0;
    } else {
      result.rows_per_expert[i - peers.size] = 0;
    }
  }
  for (int s = 0; s < peers.size; ++s) {
    const uint64_t* from = peers.counts(peers.rank, s, dispatch);
    for (int64_t i = w.lane(); ok && i < words; i += w.lanes()) {
      ok = w.await_tag(&from[i], dispatch, s, Phase::counts);
      if (ok) add_count(peers, result, s, i, value_of(w.read(&from[i])));
    }
  }
  return w.all(ok);
}

// Each rank says what it calls, and which of its slots the call may use. Nobody is woken for it: counts, or
// rows in place, follow and wake those who wait. Only before a redispatch do ranks wait for the call itself.
template <class Worker>
COMMLIB_HD void publish_call(Worker& w, const PeerTable& peers, uint32_t epoch, Call call) {
  for (int p = w.lane(); p < peers.size; p += w.lanes()) {
    uint64_t* word = &peers.mail_to(p).calls[epoch % kCallRing];
    w.publish(word, tagged(epoch, call.pack()));
    if (!peers.is_near(p)) {
      ship_words(w, peers, p, word, 1);
    } else if (call.op == OpKind::redispatch) {
      w.wake(peers.mail_to(p));
    }
  }
}

// Reads every rank's call at this epoch, and the slot it lends: false if one is missing at the deadline, or
// called something else.
template <class Worker>
COMMLIB_HD bool collect_calls(Worker& w, const PeerTable& peers, uint32_t epoch, Call mine, uint8_t* slots) {
  bool ok = true;
  for (int p = w.lane(); ok && p < peers.size; p += w.lanes()) {
    const uint64_t* word = &peers.mail_from(p).calls[epoch % kCallRing];
    ok = w.await_tag(word, epoch, p, Phase::call);
    if (!ok) break;
    const Call theirs = Call::unpack(value_of(w.read(word)));
    if (!theirs.agrees_with(mine)) ok = w.mismatch(p, theirs);
    slots[p] = theirs.slot;
  }
  return w.all(ok);
}

}  // namespace commlib
