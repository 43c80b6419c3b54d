// Words that carry their own flag.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace commlib {

// A tagged word: the tag (which operation) in the high half, the value in the low half. One atomic 8-byte
// store publishes both, so no fence, no reset and no second trip is needed.
COMMLIB_HD constexpr uint64_t tagged(uint32_t tag, uint32_t value) {
  return static_cast<uint64_t>(tag) << 32 | value;
}
COMMLIB_HD constexpr uint32_t tag_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
COMMLIB_HD constexpr uint32_t value_of(uint64_t word) { return static_cast<uint32_t>(word); }

// A set of ranks in the values of two tagged words, each of which is whole by itself.
COMMLIB_HD constexpr uint64_t tagged_half(uint32_t tag, uint64_t ranks, int half) {
  return tagged(tag, static_cast<uint32_t>(ranks >> 32 * half));
}
COMMLIB_HD constexpr uint64_t ranks_of_half(uint64_t word, int half) {
  return static_cast<uint64_t>(value_of(word)) << 32 * half;
}

// Whether a tag is that of operation `wanted` or of a later one. Tags count modulo 2^32; right as long as two
// ranks are fewer than 2^31 operations apart.
COMMLIB_HD constexpr bool reached(uint32_t tag, uint32_t wanted) {
  return static_cast<int32_t>(tag - wanted) >= 0;
}

}  // namespace commlib
