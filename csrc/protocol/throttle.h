// A throttle emulates a slower link: rows that leave a rank in dispatch, or come to it in combine, take as
// long as they would on a link of that rate. Serves to measure here what a slower interconnect leaves; a
// rank's rows for itself do not count.
#pragma once

#include "protocol/token_rows.h"

namespace commlib {

// How much time an idle throttle may make up for: a thread that slept too long catches up.
constexpr uint64_t kThrottleBurstNs = 200'000;

struct ThrottleRate {
  uint64_t fs_per_byte = 0;  // femtoseconds; 0: no limit

  static ThrottleRate of(double gbytes_per_s) {
    return {gbytes_per_s > 0 ? static_cast<uint64_t>(1e6 / gbytes_per_s) : 0};
  }
  COMMLIB_HD uint64_t ns(int64_t bytes) const {
    return static_cast<uint64_t>(bytes) * fs_per_byte / 1'000'000;
  }
  // When `bytes` that come at `now` have passed, if what came before them has passed at `free`.
  COMMLIB_HD uint64_t end_of(int64_t bytes, uint64_t now, uint64_t free) const {
    const uint64_t idle_since = now > kThrottleBurstNs ? now - kThrottleBurstNs : 0;
    return (free > idle_since ? free : idle_since) + ns(bytes);
  }
};

// How many of a token's rows lie at those ranks, other than this one, of which counts(rank) holds.
template <class Counts>
COMMLIB_HD int remote_rows(const TokenRows& rows, int rank, Counts counts) {
  int remote = 0;
  for (int j = 0; j < rows.most; ++j) {
    const int64_t row = rows.at(j);
    remote += row != kNoRoute && rank_of(row) != rank && counts(rank_of(row));
  }
  return remote;
}

// Waits until the rows of one token have had their time on the link.
template <class Worker>
COMMLIB_HD void pass_throttle(Worker& w, const TokenRows& rows, int rank, int64_t row_bytes) {
  if (w.throttled()) w.pass_throttle(remote_rows(rows, rank, [](int) { return true; }) * row_bytes);
}

}  // namespace commlib
