// A set of ranks as the bits of one word.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace commlib {

constexpr int kMaxRanks = 64;

COMMLIB_HD constexpr uint64_t bit_of(int rank) { return uint64_t{1} << rank; }
COMMLIB_HD constexpr bool has(uint64_t mask, int rank) { return mask >> rank & 1; }
COMMLIB_HD constexpr uint64_t first_ranks(int count) { return ~uint64_t{0} >> (kMaxRanks - count); }
COMMLIB_HD int lowest_bit(uint64_t mask) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(mask)) - 1;
#else
  return __builtin_ctzll(mask);
#endif
}
COMMLIB_HD int count_bits(uint64_t mask) {
#ifdef __CUDA_ARCH__
  return __popcll(mask);
#else
  return __builtin_popcountll(mask);
#endif
}

// The index of `rank` in the ascending list of the ranks in `mask`, and the rank at an index.
COMMLIB_HD int index_in(uint64_t mask, int rank) { return count_bits(mask & (bit_of(rank) - 1)); }
COMMLIB_HD int rank_at(uint64_t mask, int index) {
  while (index-- > 0) mask &= mask - 1;
  return lowest_bit(mask);
}

}  // namespace commlib
