#include "backend/team.h"

#include <algorithm>

#include "backend/communicator.h"

namespace commlib {

void Team::add(Communicator& member) {
  std::lock_guard<std::mutex> lock(mutex_);
  members_.push_back(&member);
  if (!why_.empty()) member.leave_alone(kGaveUp, blamed_, why_);
}

void Team::remove(Communicator& member) {
  std::lock_guard<std::mutex> lock(mutex_);
  members_.erase(std::remove(members_.begin(), members_.end(), &member), members_.end());
}

void Team::give_up(const Communicator& member, uint64_t blamed, const std::string& why) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!why_.empty()) return;
  why_ = why;
  blamed_ = blamed;
  has_given_up_.store(true, std::memory_order_release);
  for (Communicator* other : members_) {
    if (other != &member) other->leave_alone(kGaveUp, blamed, why);
  }
}

}  // namespace commlib
