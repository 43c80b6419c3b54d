// The plan of a bounded dispatch: what comes is bounded by the room there is, not known to the host, which
// waits for nothing. So nothing is refused: what is wrong is left out, counted, and said afterwards. And
// there is one round of counts: all ranks see in them what has no room, and leave out the same.
#pragma once

#include "protocol/planning.h"

namespace commlib {

// What was wrong with a bounded dispatch, of this rank's ids or of what has come here.
struct Trouble {
  PlanStatus status;  // placed: nothing
  int64_t bad_index;  // bad_id: into topk_idx, and what it holds
  int64_t bad_id;
  int64_t rows;     // overflow: that would have come,
  int64_t dropped;  // and that were left out
};

// The unique rows that are kept of each source's: the first ones, by source, then token.
template <int kWorkers, class Worker>
COMMLIB_HD void keep_first_rows(Worker& w, const PlanOp& op, const PeerTable& peers,
                                const PlanShared<kWorkers>& s) {
  int64_t before = 0;
  for (int first = 0; first < peers.size; first += w.lanes()) {
    const int p = first + w.lane();
    const int64_t rows = p < peers.size ? s.source_rows[p] : 0;
    const Prefix here = w.prefix(rows);
    const int64_t left = op.capacity - before - here.before;
    if (p < peers.size) op.record->source_rows[p] = rows < left ? rows : left > 0 ? left : 0;
    before += here.all;
  }
}

template <class Worker>
COMMLIB_HD int64_t sum_of(Worker& w, const int64_t* items, int64_t count) {
  int64_t sum = 0;
  for (int64_t first = 0; first < count; first += w.lanes()) {
    const int64_t i = first + w.lane();
    sum += w.prefix(i < count ? items[i] : 0).all;
  }
  return sum;
}

// Cuts what comes here to the room there is, in the record and in what the caller reads. Called by the first
// worker.
template <int kWorkers, class Worker>
COMMLIB_HD Trouble bound_rows(Worker& w, const PlanOp& op, const PeerTable& peers,
                              const PlanShared<kWorkers>& s) {
  const int64_t experts = op.routing.placement.count(peers.rank), received = s.received[peers.rank];
  const int64_t unique = received < op.capacity ? received : op.capacity;
  int64_t limit = kNoLimit, rows = received, kept = unique;
  record_plan(w, op, peers, s);
  keep_first_rows(w, op, peers, s);
  w.all(true);
  if (op.offsets) {
    rows = sum_of(w, op.rows_per_expert, experts);
    limit = limit_of(w, op, op.rows_per_expert, experts, op.shape);
    write_offsets(w, op, experts, limit);
    w.all(true);
    kept = sum_of(w, op.rows_per_expert, experts);
  }
  if (w.lane() == 0) {
    op.record->limit = limit;
    op.record->recounts = !op.offsets && unique < received;
    op.totals[0] = unique;
    op.totals[1] = rows - kept;
  }
  const int64_t bad = s.first_bad_index();
  if (bad != kNoBadId) return {PlanStatus::bad_id, bad, op.routing.topk_idx[bad], 0, 0};
  return {kept < rows && !op.drop ? PlanStatus::overflow : PlanStatus::placed, 0, 0, rows, rows - kept};
}

// note(trouble): called by the first worker, if there is any. False: a wait has failed.
template <int kWorkers, class Worker, class Note>
COMMLIB_HD bool run_bounded_plan(Worker& w, const PlanOp& op, const PeerTable& peers, PlanShared<kWorkers>& s,
                                 Note note) {
  if (!w.meet(w.index() > 0 || await_slot(w, peers))) return false;
  count_tokens(w, op, s);
  if (!exchange_counts(w, op, peers, s, 1)) return false;
  place_rows(w, op, s);
  if (s.received[s.fullest_rank(peers.size)] > op.capacity) drop_rows(w, op, s);
  if (w.index() == 0) {
    const Trouble trouble = bound_rows(w, op, peers, s);
    if (trouble.status != PlanStatus::placed) note(trouble);
  }
  place_grouped_rows(w, op, peers.rank, s);
  return true;
}

}  // namespace commlib
