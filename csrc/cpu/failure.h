// What a wait that did not end leaves behind.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "protocol/words.h"

namespace commlib {

enum class Cause : uint8_t { timeout, exited, left, mismatch, interrupted, broken };

struct Failure {
  Cause cause = Cause::timeout;
  int rank = 0;
  std::vector<int> peers;  // who was waited for
  OpKind op = OpKind::none;
  Phase phase = Phase::counts;
  uint32_t epoch = 0;
  double seconds = 0;  // how long
  std::string detail;  // what the peers last said
};

std::string describe(const Failure& failure);

// A peer did not do its part. The communicator is of no use any more.
class CommFailure : public std::runtime_error {
 public:
  explicit CommFailure(Failure failure)
      : std::runtime_error(describe(failure)), failure(std::move(failure)) {}
  Failure failure;
};

// More rows than capacity, on the rank named. Every rank raises it, and may go on.
class CapacityError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A slot, handle or buffer used in a way that its state does not allow.
class SlotError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace commlib
