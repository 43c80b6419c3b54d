// Counts: every rank tells every other how many rows it has for each rank, and for each of that rank's
// experts. From all counts each rank knows where its own rows begin everywhere.
#pragma once

#include "protocol/notify.h"
#include "protocol/plan.h"

namespace commlib {

// The words that one rank gets from each source: [ranks] row counts; then counts of its own experts. Or,
// where sources are to know where rows lie in its groups, counts of all experts, and then the shape of the
// source's own groups.
struct CountWords {
  Placement placement;
  bool of_all;  // experts

  COMMLIB_HD int64_t first_expert(int p) const { return of_all ? 0 : placement.first_expert(p); }
  COMMLIB_HD int64_t experts(int p) const { return of_all ? placement.experts : placement.count(p); }
  COMMLIB_HD int64_t shape_at() const { return placement.ranks + placement.experts; }
  COMMLIB_HD int64_t to(int p) const { return placement.ranks + experts(p) + (of_all ? 1 : 0); }
  // For as many there is room.
  COMMLIB_HD int64_t most() const {
    return placement.ranks + (of_all ? placement.experts + 1 : placement.max_count());
  }
};

// Sends rank p its words, each tagged with the dispatch: it is value and flag in one, and orders nothing
// else. The call says that this rank's slot may be written. Workers share the ranks.
template <class Worker>
COMMLIB_HD void publish_counts(Worker& w, const PeerTable& peers, const CountWords& of,
                               const SourceCounts& counts, const GroupShape& shape, uint32_t dispatch) {
  for (int p = w.index(); p < peers.size; p += w.count()) {
    uint64_t* words = peers.counts(p, peers.rank, dispatch);
    for (int q = w.lane(); q < peers.size; q += w.lanes()) {
      w.store_relaxed(&words[q], tagged(dispatch, counts.per_rank[q]));
    }
    const int64_t first = of.first_expert(p);
    for (int64_t e = w.lane(); e < of.experts(p); e += w.lanes()) {
      w.store_relaxed(&words[peers.size + e], tagged(dispatch, counts.per_expert[first + e]));
    }
    if (of.of_all && w.lane() == 0) {
      w.store_relaxed(&words[of.shape_at()], tagged(dispatch, shape.word()));
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
  // Where counts are of all experts:
  uint32_t* expert_firsts;  // [experts]: in each group, the rows of the sources below this rank
  uint32_t* expert_rows;    // [experts]: in each group
  int64_t* shapes;          // [ranks]: GroupShape::word of each rank's groups
};

// One count word, summed over sources.
struct CountSum {
  int64_t before = 0;  // over the sources below this rank
  int64_t all = 0;
};

// Sums word i of every source; each(source, value, sum over the sources below). Looks at several sources at
// once, because a look at another's word takes long, and waits only for words that are not there yet.
template <class Worker, class Each>
COMMLIB_HD bool sum_count(Worker& w, const PeerTable& peers, uint32_t dispatch, int64_t i, CountSum* sum,
                          Each each) {
  constexpr int kAtOnce = 8;
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
      each(first + j, rows, sum->all);
      sum->all += rows;
    }
    first += n;
  }
  return true;
}

// Workers and their lanes share the words; each sums its own over all sources, so no two add to one sum. Each
// worker returns whether its words are there.
template <class Worker>
COMMLIB_HD bool collect_counts(Worker& w, const PeerTable& peers, const CountWords& of, uint32_t dispatch,
                               const CountsResult& result) {
  const int64_t words = of.to(peers.rank);
  const int64_t first_own = of.of_all ? of.placement.first_expert(peers.rank) : 0;
  const int64_t own_experts = of.placement.count(peers.rank);
  const int64_t step = static_cast<int64_t>(w.count()) * w.lanes();
  bool ok = true;
  for (int64_t i = w.index() * w.lanes() + w.lane(); ok && i < words; i += step) {
    const int64_t expert = i - peers.size, own = expert - first_own;
    const bool is_own = expert >= 0 && own >= 0 && own < own_experts;
    const bool is_shape = of.of_all && i == of.shape_at();
    int64_t* firsts = is_own ? result.group_firsts + own : nullptr;
    CountSum sum;
    ok = sum_count(w, peers, dispatch, i, &sum, [&](int source, int64_t rows, int64_t before) {
      if (i == peers.rank) result.source_rows[source] = rows;
      if (is_shape) result.shapes[source] = rows;
      if (firsts) firsts[source * own_experts] = before;
    });
    if (!ok) break;
    if (expert < 0) {
      result.base[i] = sum.before;
      result.received[i] = sum.all;
    }
    if (is_own) result.rows_per_expert[own] = sum.all;
    if (of.of_all && expert >= 0 && !is_shape) {
      result.expert_firsts[expert] = static_cast<uint32_t>(sum.before);
      result.expert_rows[expert] = static_cast<uint32_t>(sum.all);
    }
  }
  return w.all(ok);
}

}  // namespace commlib
