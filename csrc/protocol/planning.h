// The plan of a fresh dispatch: from expert ids to routes, and counts from rank to rank. The workers of one
// block of a GPU make it together; on a CPU one thread does.
#pragma once

#include "protocol/calls.h"
#include "protocol/counts.h"
#include "protocol/slot.h"

namespace commlib {

struct PlanOp {
  RouterOutput routing;
  int64_t* routes;           // [tokens][width]
  int32_t* ordinals;         // [tokens][topk]: see Slot
  int64_t* group_firsts;     // [ranks][own experts]: see Slot
  PlanRecord* record;        // the slot's
  int64_t* rows_per_expert;  // [own experts]
  int64_t* offsets;          // [own experts + 1]; null: layout="rank"
  bool groups;               // rows may go straight to their places in the groups of ranks:
  int64_t* places;           // [tokens][topk]: see place_in_groups
  int64_t grouped_rows;      // for as many a slot has room
  GroupShape shape;          // of this rank's groups
  int64_t capacity;
  bool drop;
  int64_t* totals;    // bounded: see RoutePlan; null: the host waits for the plan
  int64_t most_rows;  // bounded: that the groups of a rank may have,
  int64_t padded;     // besides the padding of so many experts
  // Scratch.
  uint32_t* expert_counts;  // [experts]
  uint32_t* worker_counts;  // [workers][experts]
  uint32_t* group_rows;     // [experts]: once groups begin, where the rows of each end; and
  uint32_t* group_begins;   // [experts], where rows may go there
};

// Whether this plan is one of groups.
template <class Worker>
COMMLIB_HD bool plans_groups(const PlanOp& op) {
  return Worker::kPlansGroups && op.groups;
}

// How a dispatch's counts came out.
enum class PlanStatus : uint64_t { placed = 0, bad_id = 1, overflow = 2 };

// What whoever started the plan waits for.
struct PlanReport {
  PlanStatus status;
  int64_t bad_index;  // bad_id: into topk_idx, and what it holds
  int64_t bad_id;
  int64_t fullest;  // overflow: the rank that would receive most, and how much
  int64_t fullest_rows;
  int64_t dropped;       // of this rank's (token, rank) pairs
  int64_t grouped_rows;  // layout="expert"
  int64_t rows;          // placed: unique
  bool grouped_in_slot;  // placed: they come grouped
};

// What the workers of a plan tell each other, with meet() in between.
template <int kWorkers>
struct PlanShared {
  uint32_t rank_counts[kWorkers][kMaxRanks];  // rows of each worker's tokens
  int64_t firsts[kWorkers][kMaxRanks];        // the first of them: of all workers' rows, then at each rank
  uint32_t rank_totals[kMaxRanks];
  int64_t base[kMaxRanks], received[kMaxRanks], source_rows[kMaxRanks];
  int64_t shapes[kMaxRanks], grouped_rows[kMaxRanks];
  int64_t bad[kWorkers];
  uint32_t dropped;
  Lent lent;

  // The ranks whose groups have no more rows than `room`, as a mask.
  COMMLIB_HD uint64_t fitting(int ranks, int64_t room) const {
    uint64_t fits = 0;
    for (int p = 0; p < ranks; ++p) fits |= grouped_rows[p] <= room ? bit_of(p) : 0;
    return fits;
  }
  COMMLIB_HD int64_t first_bad_index() const {
    int64_t least = kNoBadId;
    for (const int64_t index : bad) least = index < least ? index : least;
    return least;
  }
  COMMLIB_HD int fullest_rank(int ranks) const {
    int fullest = 0;
    for (int p = 1; p < ranks; ++p) {
      if (received[p] > received[fullest]) fullest = p;
    }
    return fullest;
  }
};

// Counts of `items` by worker -> their sum, and that of all workers before each. Lanes share the items.
template <int kWorkers, class Before, class Worker>
COMMLIB_HD void sum_over_workers(Worker& w, const uint32_t* counts, Before* firsts, uint32_t* totals,
                                 int64_t items, int64_t stride) {
  const int step = w.count() * w.lanes();
  for (int64_t i = w.index() * w.lanes() + w.lane(); i < items; i += step) {
    uint32_t seen[kWorkers], sum = 0;
#pragma unroll
    for (int worker = 0; worker < kWorkers; ++worker) seen[worker] = counts[worker * stride + i];
#pragma unroll
    for (int worker = 0; worker < kWorkers; ++worker) {
      firsts[worker * stride + i] = sum;
      sum += seen[worker];
    }
    totals[i] = sum;
  }
}

template <class Worker>
COMMLIB_HD uint32_t* expert_counts_of(Worker& w, const PlanOp& op) {
  return op.worker_counts + w.index() * op.routing.placement.experts;
}

// Every worker counts its part of the tokens; the sums over workers are then its first row of each rank and
// of each expert.
template <int kWorkers, class Worker>
COMMLIB_HD void count_tokens(Worker& w, const PlanOp& op, PlanShared<kWorkers>& s) {
  const auto ranks = static_cast<int>(op.routing.placement.ranks);
  const int64_t experts = op.routing.placement.experts;
  uint32_t* mine = expert_counts_of(w, op);
  for (int p = w.lane(); p < ranks; p += w.lanes()) s.rank_counts[w.index()][p] = 0;
  for (int64_t e = w.lane(); e < experts; e += w.lanes()) mine[e] = 0;
  if (w.index() == 0 && w.lane() == 0) s.dropped = 0;
  w.all(true);
  const int64_t bad = count_routes(w, op.routing, op.routes, {s.rank_counts[w.index()], mine});
  if (w.lane() == 0) s.bad[w.index()] = bad;
  w.meet(true);
  sum_over_workers<kWorkers>(w, s.rank_counts[0], s.firsts[0], s.rank_totals, ranks, kMaxRanks);
  sum_over_workers<kWorkers>(w, op.worker_counts, op.worker_counts, op.expert_counts, experts, experts);
  w.meet(true);
}

// How many rows of each expert are kept, so that a rank's groups have no more than there is room for: as many
// as possible, and the same for all of its experts, so that none starves. Every rank finds the same.
template <class Worker, class Count>
COMMLIB_HD int64_t limit_of(Worker& w, const PlanOp& op, const Count* rows_per_expert, int64_t experts,
                            const GroupShape& shape) {
  if (!Worker::kBoundsPlans || !op.totals) return kNoLimit;
  if (shape.fixed) return shape.fixed;
  const int64_t most = op.most_rows + op.padded * (shape.align - 1);
  const auto fits_with = [&](int64_t limit) {
    return group_rows(w, rows_per_expert, experts, shape, limit, [](int64_t, int64_t, int64_t) {}) <= most;
  };
  if (fits_with(kNoLimit)) return kNoLimit;
  int64_t fits = 0, too_many = most + 1;
  while (too_many - fits > 1) {
    const int64_t middle = fits + (too_many - fits) / 2;
    (fits_with(middle) ? fits : too_many) = middle;
  }
  return fits;
}

// Where this rank's rows begin in every group, from the rows of lower sources in it, and how many rows each
// rank's groups have.
template <int kWorkers, class Worker>
COMMLIB_HD bool begin_groups(Worker& w, const PlanOp& op, PlanShared<kWorkers>& s) {
  const Placement& placement = op.routing.placement;
  for (int p = w.index(); p < placement.ranks; p += w.count()) {
    const int64_t first = placement.first_expert(p);
    const GroupShape shape = GroupShape::from_word(s.shapes[p]);
    const int64_t experts = placement.count(p);
    const int64_t limit = limit_of(w, op, op.group_rows + first, experts, shape);
    const int64_t rows = group_rows(w, op.group_rows + first, experts, shape, limit,
                                    [&](int64_t e, int64_t row, int64_t kept) {
                                      op.group_begins[first + e] += static_cast<uint32_t>(row);
                                      op.group_rows[first + e] = static_cast<uint32_t>(row + kept);
                                    });
    if (w.lane() == 0) s.grouped_rows[p] = rows;
  }
  return w.meet(true);
}

// Publishes this rank's counts and reads the others'. The first worker also lends the slot; the last one,
// which has few words to sum, reads every rank's call.
template <int kWorkers, class Worker>
COMMLIB_HD bool exchange_counts(Worker& w, const PlanOp& op, const PeerTable& peers, PlanShared<kWorkers>& s,
                                int round) {
  const CountWords words{op.routing.placement, plans_groups<Worker>(op)};
  const uint32_t number = w.counted() + 1;
  if (round == 1 && w.index() == 0) publish_call(w, peers, w.id());
  publish_counts(w, peers, words, {s.rank_totals, op.expert_counts}, op.shape, number);
  bool ok = collect_counts(w, peers, words, number,
                           {s.base, s.received, s.source_rows, op.rows_per_expert, op.group_firsts,
                            op.group_begins, op.group_rows, s.shapes});
  if (round == 1 && w.index() == w.count() - 1) {
    ok = ok && collect_calls(w, peers, w.id(), &s.lent);
  }
  ok = w.meet(ok);
  if (w.index() == 0 && w.lane() == 0) w.has_counted(number);
  return ok && (!plans_groups<Worker>(op) || begin_groups(w, op, s));
}

// What the rows of this plan need to know. Called by the first worker.
template <int kWorkers, class Worker>
COMMLIB_HD void record_plan(Worker& w, const PlanOp& op, const PeerTable& peers,
                            const PlanShared<kWorkers>& s) {
  PlanRecord& record = *op.record;
  for (int p = w.lane(); p < peers.size; p += w.lanes()) {
    record.source_rows[p] = s.source_rows[p];
    record.lent.slots[p] = s.lent.slots[p];
  }
  if (w.lane() != 0) return;
  record.lent.grouped =
      plans_groups<Worker>(op) ? s.lent.grouped & s.fitting(peers.size, op.grouped_rows) : 0;
  record.limit = kNoLimit;
  record.recounts = false;
}

// Where the groups of this rank's rows begin. Returns how many rows they have.
template <class Worker>
COMMLIB_HD int64_t write_offsets(Worker& w, const PlanOp& op, int64_t experts, int64_t limit) {
  const int64_t rows =
      group_rows(w, op.rows_per_expert, experts, op.shape, limit, [&](int64_t e, int64_t row, int64_t kept) {
        op.offsets[e] = row;
        op.rows_per_expert[e] = kept;
      });
  if (w.lane() == 0) op.offsets[experts] = rows;
  return rows;
}

// Called by the first worker.
template <int kWorkers, class Worker>
COMMLIB_HD void report_plan(Worker& w, const PlanOp& op, const PeerTable& peers,
                            const PlanShared<kWorkers>& s, PlanStatus status, PlanReport& to) {
  if (status == PlanStatus::placed) {
    record_plan(w, op, peers, s);
    const int64_t rows =
        op.offsets ? write_offsets(w, op, op.routing.placement.count(peers.rank), kNoLimit) : 0;
    if (w.lane() == 0) {
      to.rows = s.received[peers.rank];
      to.grouped_rows = rows;
      to.grouped_in_slot = has(op.record->lent.grouped, peers.rank);
    }
  }
  w.all(true);
  if (w.lane() != 0) return;
  const int64_t bad = s.first_bad_index();
  to.status = status;
  to.dropped = s.dropped;
  to.bad_index = bad;
  to.bad_id = bad == kNoBadId ? 0 : op.routing.topk_idx[bad];
  to.fullest = s.fullest_rank(peers.size);
  to.fullest_rows = s.received[to.fullest];
}

// Turns ordinals into rows, and numbers each row among those of its expert.
template <int kWorkers, class Worker>
COMMLIB_HD void place_rows(Worker& w, const PlanOp& op, PlanShared<kWorkers>& s) {
  int64_t* firsts = s.firsts[w.index()];
  for (int p = w.lane(); p < op.routing.placement.ranks; p += w.lanes()) firsts[p] += s.base[p];
  w.all(true);
  place_routes(w, op.routing, op.routes, firsts);
  number_rows_of_experts(w, op.routing, op.ordinals, expert_counts_of(w, op));
}

// The same for rows in their groups, once no row is dropped any more.
template <int kWorkers, class Worker>
COMMLIB_HD void place_grouped_rows(Worker& w, const PlanOp& op, int rank, const PlanShared<kWorkers>& s) {
  if (!plans_groups<Worker>(op)) return;
  w.all(true);  // lanes have numbered other lanes' rows
  const auto ranks = static_cast<int>(op.routing.placement.ranks);
  const uint64_t fits = s.fitting(ranks, op.grouped_rows) | bit_of(rank);
  const Span part = w.share(op.routing.tokens);
#pragma unroll 1
  for (int64_t t = part.begin + w.lane(); t < part.end; t += w.lanes()) {
    place_in_groups(op.routing, t, op.routes, op.ordinals, op.group_begins, op.group_rows, fits, op.places);
  }
}

// Drops the rows past capacity.
template <int kWorkers, class Worker>
COMMLIB_HD void drop_rows(Worker& w, const PlanOp& op, PlanShared<kWorkers>& s) {
  w.meet(true);  // routes are written by lanes of one token each, and dropped by others
  const int64_t dropped =
      drop_overflow(w, op.routing, op.routes, {s.rank_totals, op.expert_counts}, op.capacity);
  if (dropped) w.add_relaxed(&s.dropped, static_cast<int>(dropped));
  w.meet(true);
}

// report(status): called by the first worker as soon as the sizes are known; the rows are placed
// after that. Where rows are dropped, all ranks see the same overflow in the counts, so all take a second
// round. False: a wait has failed, and there is no report.
template <int kWorkers, class Worker, class Report>
COMMLIB_HD bool run_plan(Worker& w, const PlanOp& op, const PeerTable& peers, PlanShared<kWorkers>& s,
                         Report report) {
  if (!w.meet(w.index() > 0 || await_slot(w, peers))) return false;
  count_tokens(w, op, s);
  if (s.first_bad_index() != kNoBadId) {
    if (w.index() == 0) report(PlanStatus::bad_id);
    return true;
  }
#pragma unroll 1
  for (int round = 1;; ++round) {
    if (!exchange_counts(w, op, peers, s, round)) return false;
    const bool overflow = round == 1 && s.received[s.fullest_rank(peers.size)] > op.capacity;
    const bool again = overflow && op.drop;
    if (!again && w.index() == 0) report(overflow ? PlanStatus::overflow : PlanStatus::placed);
    if (overflow && !again) return true;
    if (round == 1) place_rows(w, op, s);
    if (!again) {
      place_grouped_rows(w, op, peers.rank, s);
      return true;
    }
    drop_rows(w, op, s);
  }
}

}  // namespace commlib
