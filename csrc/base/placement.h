// Which rank owns which expert: the only place that knows.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace commlib {

// Experts lie on ranks in contiguous, balanced blocks: rank r owns [first_expert(r), first_expert(r + 1)).
// E need not be a multiple of R; block sizes then differ by one. E is at most 2^20, so products fit in 32
// bits, in which a GPU divides much faster.
struct Placement {
  int64_t experts;
  int64_t ranks;

  COMMLIB_HD int64_t first_expert(int64_t rank) const { return quotient(rank * experts, ranks); }
  COMMLIB_HD int64_t count(int64_t rank) const { return first_expert(rank + 1) - first_expert(rank); }
  COMMLIB_HD int64_t max_count() const { return quotient(experts + ranks - 1, ranks); }
  COMMLIB_HD int owner(int64_t expert) const {
    return static_cast<int>(quotient((expert + 1) * ranks - 1, experts));
  }

 private:
  COMMLIB_HD static int64_t quotient(int64_t a, int64_t b) {
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  }
};

}  // namespace commlib
