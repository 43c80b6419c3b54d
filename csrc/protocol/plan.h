// Plan of a dispatch: from expert ids to the row that each token takes at each rank. Order is by source
// rank, then token, so the result is the same in every run.
#pragma once

#include "protocol/types.h"

namespace commlib {

// A route names one row of one rank: rank << 32 | row. A token has at most min(topk, ranks) of them, in
// ascending order of rank; kNoRoute ends the list early. Sums are taken in this order.
constexpr int64_t kNoRoute = -1;
COMMLIB_HD constexpr int64_t make_route(int rank, int64_t row) {
  return static_cast<int64_t>(rank) << 32 | row;
}
COMMLIB_HD constexpr int rank_of(int64_t route) { return static_cast<int>(route >> 32); }
COMMLIB_HD constexpr int64_t row_of(int64_t route) { return route & 0xffffffff; }

struct Routing {
  const int64_t* topk_idx;  // [tokens][topk] global expert ids, -1: none
  int64_t tokens;
  int topk;
  int width;  // routes kept for each token: min(topk, ranks)
  Placement placement;
  const uint8_t* owner;  // [experts]: Placement::owner as a table
};

// The rows of one source, counted by destination.
struct SourceCounts {
  uint32_t* per_rank;    // [ranks] unique rows
  uint32_t* per_expert;  // [experts]
};

struct BadExpert {  // the first id outside [-1, experts), if any
  int64_t token = -1;
  int place = 0;
  int64_t value = 0;
};

// First pass. Routes hold each row's ordinal among this source's rows for that rank, until all ranks'
// counts are known.
COMMLIB_HD BadExpert count_routes(const Routing& in, int64_t* routes, SourceCounts counts) {
  for (int64_t t = 0; t < in.tokens; ++t) {
    const int64_t* ids = in.topk_idx + t * in.topk;
    uint64_t ranks = 0;
    for (int k = 0; k < in.topk; ++k) {
      const int64_t e = ids[k];
      if (e == -1) continue;
      if (e < -1 || e >= in.placement.experts) return {t, k, e};
      ++counts.per_expert[e];
      ranks |= uint64_t{1} << in.owner[e];
    }
    int64_t* route = routes + t * in.width;
    int n = 0;
    for (; ranks; ranks &= ranks - 1) {
      const int p = __builtin_ctzll(ranks);
      route[n++] = make_route(p, counts.per_rank[p]++);
    }
    while (n < in.width) route[n++] = kNoRoute;
  }
  return {};
}

// Drops the routes whose row would lie at or past `capacity` and takes their experts off the counts:
// those of the last tokens of the last ranks. Ordinals of the others stay as they are.
COMMLIB_HD int64_t drop_overflow(const Routing& in, int64_t* routes, SourceCounts counts, const int64_t* base,
                                 int64_t capacity) {
  int64_t dropped = 0;
  for (int64_t t = 0; t < in.tokens; ++t) {
    int64_t* route = routes + t * in.width;
    int kept = 0;
    for (int j = 0; j < in.width && route[j] != kNoRoute; ++j) {
      const int p = rank_of(route[j]);
      if (base[p] + row_of(route[j]) < capacity) {
        route[kept++] = route[j];
        continue;
      }
      ++dropped;
      --counts.per_rank[p];
      for (int k = 0; k < in.topk; ++k) {
        const int64_t e = in.topk_idx[t * in.topk + k];
        if (e >= 0 && in.owner[e] == p) --counts.per_expert[e];
      }
    }
    while (kept < in.width && route[kept] != kNoRoute) route[kept++] = kNoRoute;
  }
  return dropped;
}

// Second pass: ordinals become rows, now that `base` (this source's first row at each rank) is known.
COMMLIB_HD void place_routes(const Routing& in, int64_t* routes, const int64_t* base) {
  for (int64_t i = 0; i < in.tokens * in.width; ++i) {
    if (routes[i] != kNoRoute) routes[i] += base[rank_of(routes[i])];
  }
}

// layout="expert": groups of rows by local expert, each padded to a multiple of `align` rows.
// offsets [experts + 1] from the number of rows of each expert; returns the number of rows in all.
COMMLIB_HD int64_t group_offsets(const int64_t* rows_per_expert, int64_t experts, int64_t align,
                                 int64_t* offsets) {
  offsets[0] = 0;
  for (int64_t e = 0; e < experts; ++e) {
    offsets[e + 1] = offsets[e] + (rows_per_expert[e] + align - 1) / align * align;
  }
  return offsets[experts];
}

// places [rows][topk]: the grouped row of each (unique row, place), -1 where the expert is another rank's.
// `next` [experts] is scratch, filled with the groups' first rows.
COMMLIB_HD void group_rows(const int32_t* experts_of_rows, int64_t rows, int topk, int64_t* next,
                           int64_t* places) {
  for (int64_t i = 0; i < rows * topk; ++i) {
    const int32_t e = experts_of_rows[i];
    places[i] = e < 0 ? -1 : next[e]++;
  }
}

}  // namespace commlib
