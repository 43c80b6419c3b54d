// Counts: every rank tells every other how many rows it has for each rank, and for each of that rank's
// experts. From all counts each rank knows where its own rows begin everywhere.
#pragma once

#include "protocol/notify.h"
#include "protocol/plan.h"

namespace commlib {

COMMLIB_HD int64_t count_words(const Placement& placement) { return placement.ranks + placement.max_count(); }

// Sends rank p [ranks] row counts and [experts of p] counts, each word tagged with the dispatch: it is value
// and flag in one, and orders nothing else. The call says that this rank's slot may be written. Workers share
// the ranks.
template <class Worker>
COMMLIB_HD void publish_counts(Worker& w, const PeerTable& peers, const Placement& placement,
                               const SourceCounts& counts, uint32_t dispatch) {
  for (int p = w.index(); p < peers.size; p += w.count()) {
    uint64_t* words = peers.counts(p, peers.rank, dispatch);
    for (int q = w.lane(); q < peers.size; q += w.lanes()) {
      w.store_relaxed(&words[q], tagged(dispatch, counts.per_rank[q]));
    }
    const int64_t first = placement.first_expert(p);
    for (int64_t e = w.lane(); e < placement.count(p); e += w.lanes()) {
      w.store_relaxed(&words[peers.size + e], tagged(dispatch, counts.per_expert[first + e]));
    }
    notify(w, peers, p, words, peers.count_words);
  }
}

// Where rows go, from all counts.
struct CountsResult {
  int64_t* base;             // [ranks]: this rank's first row at each rank
  int64_t* received;         // [ranks]: all rows that each rank receives
  int64_t* source_rows;      // [ranks]: rows this rank receives from each source
  int64_t* rows_per_expert;  // [own experts]
  int64_t* group_firsts;     // [sources][own experts]: see Slot
};

// One count word, summed over sources.
struct CountSum {
  int64_t before = 0;  // over the sources below this rank
  int64_t all = 0;
};

// Sums word i of every source's `words`: that of rank i, or of own expert i - ranks. Looks at several sources
// at once, because a look at another's word takes long, and waits only for words that are not there yet.
template <class Worker>
COMMLIB_HD bool sum_count(Worker& w, const PeerTable& peers, uint32_t dispatch, int64_t i, int64_t words,
                          const CountsResult& result, CountSum* sum) {
  constexpr int kAtOnce = 8;
  int64_t* firsts = nullptr;
  if (i >= peers.size) firsts = result.group_firsts + (i - peers.size);
  for (int first = 0; first < peers.size;) {
    const int n = peers.size - first < kAtOnce ? peers.size - first : kAtOnce;
    const auto word = [&](int j) { return &peers.counts(peers.rank, first + j, dispatch)[i]; };
    uint64_t seen[kAtOnce];
    bool here = true;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      seen[j] = w.load_relaxed(word(j < n ? j : 0));
      here = here && tag_of(seen[j]) == dispatch;
    }
    if (!here) {
#pragma unroll 1
      for (int j = 0; j < n; ++j) {
        if (!w.await_tag(word(j), dispatch, first + j, Phase::counts)) return false;
      }
      continue;  // and look again
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (j >= n) break;
      const auto rows = static_cast<int64_t>(value_of(seen[j]));
      if (first + j < peers.rank) sum->before += rows;
      if (i == peers.rank) result.source_rows[first + j] = rows;
      if (firsts) firsts[(first + j) * (words - peers.size)] = sum->all;
      sum->all += rows;
    }
    first += n;
  }
  return true;
}

// Workers and their lanes share the words; each sums its own over all sources, so no two add to one sum. Each
// worker returns whether its words are there.
template <class Worker>
COMMLIB_HD bool collect_counts(Worker& w, const PeerTable& peers, const Placement& placement,
                               uint32_t dispatch, const CountsResult& result) {
  const int64_t words = peers.size + placement.count(peers.rank);
  const int64_t step = static_cast<int64_t>(w.count()) * w.lanes();
  bool ok = true;
  for (int64_t i = w.index() * w.lanes() + w.lane(); ok && i < words; i += step) {
    CountSum sum;
    ok = sum_count(w, peers, dispatch, i, words, result, &sum);
    if (!ok) break;
    if (i < peers.size) {
      result.base[i] = sum.before;
      result.received[i] = sum.all;
    } else {
      result.rows_per_expert[i - peers.size] = sum.all;
    }
  }
  return w.all(ok);
}

}  // namespace commlib
