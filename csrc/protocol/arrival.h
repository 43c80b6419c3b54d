// Arrival: how a source says that its rows are in place, and how a receiver waits for that.
//
// All workers of the source have a part in it, and the last one speaks for all. Each worker flushes what it
// has written, then adds to a counter that only this rank's workers share (acquire and release); the one that
// completes the count has therefore acquired what all others wrote, and what it publishes then (release, for
// all ranks) is ordered behind that. So each receiver gets one word, and no rank counts in another's memory.
#pragma once

#include "protocol/await.h"

namespace commlib {

// Whether this worker, which has flushed and speaks for `workers` of its rank, completes a count of `all`.
// The counter is then 0 again, for the next operation. All lanes.
template <class Worker>
COMMLIB_HD bool is_last(Worker& w, uint64_t* counter, int workers, int all) {
  return w.all(w.lane() != 0 ||
               w.completes(counter, static_cast<uint64_t>(workers), static_cast<uint64_t>(all)));
}

// Writes an epoch, to word_of(signals), for each of `ranks`, a mask of this node's, into what `source` says
// to it.
template <class Worker, class WordOf>
COMMLIB_HD void publish_epoch(Worker& w, const PeerTable& peers, uint64_t ranks, int source, uint64_t epoch,
                              WordOf word_of) {
#pragma unroll 1
  for (int i = w.lane(); i < peers.size; i += w.lanes()) {
    const int p = (peers.rank + i) % peers.size;
    if (!has(ranks, p)) continue;
    Signals& signals = peers.peer[p].signals[source];
    w.publish(&word_of(signals), epoch);
    w.notify(signals);
  }
}

// Tells these ranks of this node that the rows of `source` are in place.
template <class Worker>
COMMLIB_HD void publish_arrival(Worker& w, const PeerTable& peers, uint64_t ranks, int source, int wave,
                                uint64_t epoch) {
  publish_epoch(w, peers, ranks, source, epoch, [=](Signals& s) -> uint64_t& { return s.arrived[wave]; });
}

// This worker's part of an operation is in place. True where all workers' parts are. All workers call it
// together.
template <class Worker>
COMMLIB_HD bool arrive(Worker& w, const PeerTable& peers, uint64_t epoch) {
  const int workers = w.gather();
  if (!workers || !is_last(w, w.counter(kLastWave), workers, w.count())) return false;
  publish_arrival(w, peers, peers.near, peers.rank, kLastWave, epoch);
  return true;
}

// This worker's part of a wave is in place. True where all workers' parts are. Each worker calls it in its
// own time.
template <class Worker>
COMMLIB_HD bool arrive_in_wave(Worker& w, const PeerTable& peers, int wave, uint64_t epoch) {
  w.flush();
  if (!is_last(w, w.counter(wave), 1, w.count())) return false;
  publish_arrival(w, peers, peers.near, peers.rank, wave, epoch);
  return true;
}

template <class Worker>
COMMLIB_HD bool has_arrived(Worker& w, const PeerTable& peers, int source, int wave, uint64_t epoch) {
  return w.read(&peers.signals_from(source).arrived[wave]) >= epoch;
}

// Waits until the rows of every rank of `sources`, a mask, are in place.
template <class Worker>
COMMLIB_HD bool await_arrivals(Worker& w, const PeerTable& peers, uint64_t sources, int wave,
                               uint64_t epoch) {
  return await_ranks(w, peers, sources, Phase::arrival,
                     [&](int s) { return has_arrived(w, peers, s, wave, epoch); });
}

}  // namespace commlib
