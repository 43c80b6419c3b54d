// Where the rows of a token lie, on all ranks.
//
// A rank keeps a token's row once, in the order received; or, where its slot is grouped, once in the group of
// each of the token's experts that it owns. Each rank says of each operation which it is, because of its own
// results: so one routing serves both, and a rank may change from operation to operation.
#pragma once

#include "protocol/plan.h"

namespace commlib {

struct TokenRows {
  const int64_t* routes;  // of the token, `width` of them, for rows in the order received
  const int64_t* places;  // `most` of them, for rows in their groups: see place_in_groups; null: none are
  int width;
  int most;          // at() takes less than this
  uint64_t grouped;  // the ranks whose slots are grouped, as a mask

  COMMLIB_HD static TokenRows in_order(const int64_t* routes, int width) {
    return {routes, nullptr, width, width, 0};
  }
  // From those of all tokens, `places` being null where no slot can be grouped.
  COMMLIB_HD static TokenRows of(const int64_t* routes, int width, const int64_t* places, int topk,
                                 uint64_t grouped, int64_t t) {
    if (!places || grouped == 0) return in_order(routes + t * width, width);
    return {routes + t * width, places + t * topk, width, topk, grouped};
  }

  // A row, as a route, or kNoRoute, after which there may be others. By ascending rank, then top-k place.
  COMMLIB_HD int64_t at(int j) const {
    if (!places) return routes[j];
    if (places[j] == kNoRoute) return kNoRoute;
    const int p = rank_of(places[j]);
    if (has(grouped, p)) return places[j];
    if (j > 0 && is_of(j - 1, p)) return kNoRoute;
    const int r = route_to(routes, width, bit_of(p));
    return r < width ? routes[r] : kNoRoute;
  }
  // Whether row j is the only one at its rank, or one of several, or the last of those.
  COMMLIB_HD TermKind kind_of(int j) const {
    if (!places || !has(grouped, rank_of(places[j]))) return TermKind::whole;
    return j + 1 < most && is_of(j + 1, rank_of(places[j])) ? TermKind::part : TermKind::last_part;
  }

 private:
  COMMLIB_HD bool is_of(int j, int p) const { return places[j] != kNoRoute && rank_of(places[j]) == p; }
};

}  // namespace commlib
