// What a rank's operations leave for those that come after them.
#pragma once

#include "protocol/control_block.h"

namespace commlib {

struct Sequence {
  // By slot of this rank: the last operation in which ranks pull from it; 0: none. Written in that operation,
  // by the worker that completes the count of arrivals: all of them have read by then what they want to know.
  // Read by workers of the next operation that writes into the slot. It begins after the one that wrote the
  // word has ended, because a lease keeps the slot until then. (A combine of rows that lie in the slot writes
  // none of them, and does not ask.)
  uint64_t last_pull[kMaxSlots];
  // The last round of counts: rounds are numbered in the order of plans, which all ranks share. Read by the
  // workers of a plan where a round begins; written by the first of them, in the middle of it, when all have
  // read the number. Plans follow each other.
  uint32_t counted;
};

}  // namespace commlib
