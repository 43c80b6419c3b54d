// All communicators of one rank with the same other ranks.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace commlib {

class Communicator;

// When one of them gives up, all do: a rank that is missed in one order of operations would only be waited
// for in the others. Whoever waits in any of them hears of it at once.
class Team {
 public:
  // From here until remove(), `member` hears when another gives up, on any thread. Where that has happened
  // already, it gives up now.
  void add(Communicator& member);
  void remove(Communicator& member);
  // `member` has given up for this reason, blaming these ranks. The first reason counts.
  void give_up(const Communicator& member, uint64_t blamed, const std::string& why);
  // Whether one of them has ever given up.
  bool has_given_up() const { return has_given_up_.load(std::memory_order_acquire); }

 private:
  // Held while members are told, so that none goes meanwhile. A member tells the team after it has let go of
  // its own locks, and is told without a way back here: see Communicator::leave_alone.
  std::mutex mutex_;  // guards the members below it
  std::vector<Communicator*> members_;
  std::string why_;  // empty: none has given up
  uint64_t blamed_ = 0;
  std::atomic<bool> has_given_up_{false};  // set with why_ (release), and never reset; read by anyone
};

}  // namespace commlib
