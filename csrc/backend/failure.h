// Errors of the core. bindings/core.cc turns them into commlib.errors.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "protocol/failure.h"

namespace commlib {

std::vector<int> ranks_in(uint64_t mask);

// A wait that did not end, as rank `rank` reports it.
struct Failure {
  int rank = 0;
  FailureRecord record{};
  std::string detail;  // Cause::broken, Cause::lost: why

  std::vector<int> peers() const;  // the ranks blamed
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
  CapacityError(const std::string& text, int64_t rank, int64_t rows)
      : std::runtime_error(text), rank(rank), rows(rows) {}
  int64_t rank, rows;
};

// A slot, handle or buffer used in a way that its state does not allow.
class SlotError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace commlib
