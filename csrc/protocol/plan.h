// Plan of a dispatch: from expert ids to the row that each token takes at each rank. Order is by source
// rank, then token, so the result is the same in every run.
//
// Several workers share a rank's tokens in contiguous parts. Each counts its own part; a row's number is
// first its ordinal in that part, then, when the sums over parts and ranks are known, the row at its rank.
#pragma once

#include "base/placement.h"
#include "base/rank_mask.h"
#include "protocol/worker.h"

namespace commlib {

// A route names one row of one rank: rank << 32 | row. A token has at most min(topk, ranks) of them, in
// ascending order of rank; kNoRoute ends the list early. Sums are taken in this order.
constexpr int64_t kNoRoute = -1;
COMMLIB_HD constexpr int64_t make_route(int rank, int64_t row) {
  return static_cast<int64_t>(rank) << 32 | row;
}
COMMLIB_HD constexpr int rank_of(int64_t route) { return static_cast<int>(route >> 32); }
COMMLIB_HD constexpr int64_t row_of(int64_t route) { return route & 0xffffffff; }

// The number of a token's first route to one of `ranks`; `width`: there is none.
COMMLIB_HD int route_to(const int64_t* route, int width, uint64_t ranks) {
  for (int j = 0; j < width && route[j] != kNoRoute; ++j) {
    if (has(ranks, rank_of(route[j]))) return j;
  }
  return width;
}

struct RouterOutput {
  const int64_t* topk_idx;  // [tokens][topk] global expert ids, -1: none
  int64_t tokens;
  int topk;
  int width;  // routes kept for each token: min(topk, ranks)
  Placement placement;
  const uint8_t* owner;  // [experts]: Placement::owner as a table
};

// The rows of one source, counted by destination.
struct SourceCounts {
  uint32_t* per_rank;    // [ranks] unique rows of one worker's tokens
  uint32_t* per_expert;  // [experts], of all workers
};

constexpr int64_t kNoBadId = INT64_MAX;
constexpr int64_t kNoLimit = INT64_MAX;  // of an expert's rows

// How a rank's groups of rows lie: one behind the other, each padded to a multiple of `align` rows; or each
// in room for `fixed` rows, where that is not 0.
struct GroupShape {
  int64_t align = 1;
  int64_t fixed = 0;

  static constexpr uint32_t kFixed = uint32_t{1} << 31;
  // As others are told.
  COMMLIB_HD uint32_t word() const { return static_cast<uint32_t>(fixed ? fixed | kFixed : align); }
  COMMLIB_HD static GroupShape from_word(int64_t word) {
    const int64_t rows = word & (kFixed - 1);
    return word & kFixed ? GroupShape{1, rows} : GroupShape{rows, 0};
  }
  // The room of a group.
  COMMLIB_HD int64_t room(int64_t rows) const { return fixed ? fixed : (rows + align - 1) / align * align; }
};

// The expert that an id names; -1: there is none, as for an id that is out of range, where a dispatch goes on
// in spite of that.
COMMLIB_HD int64_t expert_of(int64_t id, int64_t experts) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(experts) ? id : -1;
}

// The ranks that own an expert of token t, as a mask; adds to the counts of the experts. An id outside
// [-1, experts) is taken as -1, and the index of the first such is kept in *bad. Reads several ids before it
// looks at any, and the owners of all of them: one trip to memory each.
template <class Worker>
COMMLIB_HD uint64_t ranks_of_token(Worker& w, const RouterOutput& in, int64_t t, uint32_t* per_expert,
                                   int64_t* bad) {
  constexpr int kAtOnce = 8, kBad = -2;
  uint64_t ranks = 0;
  for (int first = 0; first < in.topk; first += kAtOnce) {
    const int64_t* ids = in.topk_idx + t * in.topk + first;
    const int n = in.topk - first < kAtOnce ? in.topk - first : kAtOnce;
    int expert[kAtOnce], owner[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t id = k < n ? ids[k] : -1;
      expert[k] = id < -1 || id >= in.placement.experts ? kBad : static_cast<int>(id);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) owner[k] = expert[k] < 0 ? 0 : in.owner[expert[k]];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (expert[k] >= 0) {
        w.add_relaxed(&per_expert[expert[k]], 1);
        ranks |= uint64_t{1} << owner[k];
      } else if (expert[k] == kBad && ids - in.topk_idx + k < *bad) {
        *bad = ids - in.topk_idx + k;
      }
    }
  }
  return ranks;
}

// First pass, over this worker's part of the tokens. Routes hold ordinals within the part. Returns the first
// index into topk_idx whose id is out of range, or kNoBadId.
template <class Worker>
COMMLIB_HD int64_t count_routes(Worker& w, const RouterOutput& in, int64_t* routes, SourceCounts counts) {
  const Span part = w.share(in.tokens);
  int64_t bad = kNoBadId;
  for (int64_t first = part.begin; first < part.end; first += w.lanes()) {
    const int64_t t = first + w.lane();
    const uint64_t ranks = t < part.end ? ranks_of_token(w, in, t, counts.per_expert, &bad) : 0;
    int64_t* route = routes + t * in.width;
    int n = 0;
    for (uint64_t left = w.any_bits(ranks); left; left &= left - 1) {
      const int p = lowest_bit(left);
      const bool mine = ranks >> p & 1;
      const uint32_t ordinal = w.take(mine, &counts.per_rank[p]);
      if (mine) route[n++] = make_route(p, ordinal);
    }
    while (t < part.end && n < in.width) route[n++] = kNoRoute;
  }
  return w.lowest(bad);
}

// Second pass: ordinals of the part become rows. base [ranks]: the part's first row at each rank.
template <class Worker>
COMMLIB_HD void place_routes(Worker& w, const RouterOutput& in, int64_t* routes, const int64_t* base) {
  const Span part = w.share(in.tokens);
  for (int64_t i = part.begin * in.width + w.lane(); i < part.end * in.width; i += w.lanes()) {
    if (routes[i] != kNoRoute) routes[i] += base[rank_of(routes[i])];
  }
}

// ordinals [tokens][topk]: which of this rank's rows for its expert each is, in the order of tokens. `next`
// [experts]: the first of this worker's part; is counted up. Rows that are dropped later are their expert's
// last. Reads several ids before it looks at any.
template <class Worker>
COMMLIB_HD void number_rows_of_experts(Worker& w, const RouterOutput& in, int32_t* ordinals, uint32_t* next) {
  constexpr int kAtOnce = 4;
  const Span part = w.share(in.tokens);
  const int64_t begin = part.begin * in.topk + w.lane();
  const int64_t* id = in.topk_idx + begin;
  const int64_t* end = in.topk_idx + part.end * in.topk;
  int32_t* ordinal = ordinals + begin;
  // As long as any lane has ids left: the lanes number theirs together.
  for (; id - w.lane() < end; id += kAtOnce * w.lanes(), ordinal += kAtOnce * w.lanes()) {
    int32_t expert[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      expert[k] = id + k * w.lanes() < end
                      ? static_cast<int32_t>(expert_of(id[k * w.lanes()], in.placement.experts))
                      : -1;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const uint32_t mine = w.take_each(expert[k], next);
      if (id + k * w.lanes() < end) ordinal[k * w.lanes()] = static_cast<int32_t>(mine);
    }
  }
}

// Removes one token's routes that lie at or past `capacity`, and takes their experts off the counts; returns
// how many.
template <class Worker>
COMMLIB_HD int drop_token_overflow(Worker& w, const RouterOutput& in, int64_t t, int64_t* route,
                                   SourceCounts counts, int64_t capacity) {
  int kept = 0, dropped = 0;
  for (int j = 0; j < in.width && route[j] != kNoRoute; ++j) {
    const int p = rank_of(route[j]);
    if (row_of(route[j]) < capacity) {
      route[kept++] = route[j];
      continue;
    }
    ++dropped;
    w.add_relaxed(&counts.per_rank[p], -1);
    for (int64_t i = t * in.topk; i < (t + 1) * in.topk; ++i) {
      const int64_t e = expert_of(in.topk_idx[i], in.placement.experts);
      if (e >= 0 && in.owner[e] == p) w.add_relaxed(&counts.per_expert[e], -1);
    }
  }
  for (int j = kept; j < kept + dropped; ++j) route[j] = kNoRoute;
  return dropped;
}

// After place_routes: drops the rows that lie at or past `capacity`, those of the last tokens of the last
// ranks. The others stay where they are. Returns how many this lane dropped.
template <class Worker>
COMMLIB_HD int64_t drop_overflow(Worker& w, const RouterOutput& in, int64_t* routes, SourceCounts counts,
                                 int64_t capacity) {
  const Span part = w.share(in.tokens);
  int64_t dropped = 0;
  for (int64_t t = part.begin + w.lane(); t < part.end; t += w.lanes()) {
    dropped += drop_token_overflow(w, in, t, routes + t * in.width, counts, capacity);
  }
  return dropped;
}

// places [tokens][topk]: where the rows of token t lie in the groups of their experts, in the order of its
// routes, then of its top-k places; kNoRoute at the end.
//
// ordinals: see number_rows_of_experts. group_firsts [experts]: this rank's first row in each group, and
// group_ends where the rows of all sources end, past which they are dropped. fits: the ranks whose rows may
// lie so, as a mask; the places of others say only which rank it is.
COMMLIB_HD_APART void place_in_groups(const RouterOutput& in, int64_t t, const int64_t* routes,
                                      const int32_t* ordinals, const uint32_t* group_firsts,
                                      const uint32_t* group_ends, uint64_t fits, int64_t* places) {
  const int64_t* ids = in.topk_idx + t * in.topk;
  int64_t* place = places + t * in.topk;
  int n = 0;
#pragma unroll 1
  for (int j = 0; j < in.width && routes[t * in.width + j] != kNoRoute; ++j) {
    const int p = rank_of(routes[t * in.width + j]);
#pragma unroll 1
    for (int k = 0; k < in.topk; ++k) {
      const int64_t e = expert_of(ids[k], in.placement.experts);
      if (e < 0 || in.owner[e] != p) continue;
      const int64_t row = int64_t{group_firsts[e]} + ordinals[t * in.topk + k];
      if (row >= group_ends[e]) continue;
      place[n++] = make_route(p, has(fits, p) ? row : 0);
    }
  }
  while (n < in.topk) place[n++] = kNoRoute;
}

// Groups of rows by local expert. One worker learns where each begins, by set_begin(expert, row, its rows),
// from the number of rows of each expert, of which `limit` are kept. Returns the number of all rows.
template <class Worker, class Count, class SetBegin>
COMMLIB_HD int64_t group_rows(Worker& w, const Count* rows_per_expert, int64_t experts,
                              const GroupShape& shape, int64_t limit, SetBegin set_begin) {
  int64_t end = 0;
  for (int64_t first = 0; first < experts; first += w.lanes()) {
    const int64_t e = first + w.lane();
    int64_t rows = e < experts ? static_cast<int64_t>(rows_per_expert[e]) : 0;
    if (rows > limit) rows = limit;
    const Prefix here = w.prefix(e < experts ? shape.room(rows) : 0);
    if (e < experts) set_begin(e, end + here.before, rows);
    end += here.all;
  }
  return end;
}

}  // namespace commlib
