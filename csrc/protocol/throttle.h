// A limited link: rows that leave a rank in dispatch, or come to it in combine, take as long as they would on
// a link of that rate. For measuring here what a slower interconnect leaves; rows of a rank for itself do not
// count.
#pragma once

#include "protocol/plan.h"

namespace commlib {

// A link that was idle may make up for so much: a thread that slept too long catches up.
constexpr uint64_t kLinkBurstNs = 200'000;

struct LinkRate {
  uint64_t fs_per_byte = 0;  // femtoseconds; 0: no limit

  static LinkRate of(double gbytes_per_s) {
    return {gbytes_per_s > 0 ? static_cast<uint64_t>(1e6 / gbytes_per_s) : 0};
  }
  COMMLIB_HD uint64_t ns(int64_t bytes) const {
    return static_cast<uint64_t>(bytes) * fs_per_byte / 1'000'000;
  }
  // When `bytes` have passed that are given to the link at `now`, if what went before is through at `free`.
  COMMLIB_HD uint64_t end_of(int64_t bytes, uint64_t now, uint64_t free) const {
    const uint64_t idle_since = now > kLinkBurstNs ? now - kLinkBurstNs : 0;
    return (free > idle_since ? free : idle_since) + ns(bytes);
  }
};

// Rows on a token's routes that cross the rank's link.
COMMLIB_HD int remote_rows(const int64_t* route, int width, int rank) {
  int rows = 0;
  for (int j = 0; j < width && route[j] != kNoRoute; ++j) rows += rank_of(route[j]) != rank;
  return rows;
}

// Waits until the rows of one token have had their time on the link.
template <class Worker>
COMMLIB_HD void pass_link(Worker& w, const int64_t* route, int width, int rank, int64_t row_bytes) {
  if (w.link_limited()) w.pass_link(remote_rows(route, width, rank) * row_bytes);
}

}  // namespace commlib
