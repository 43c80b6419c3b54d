// Watches the processes of other ranks of this host.
#pragma once

#include <sys/types.h>

#include <memory>
#include <vector>

namespace commlib {

class WatchedProcess;

class PeerProcesses {
 public:
  static constexpr pid_t kNotHere = -1;  // on another node: not to be watched
  // Throws std::runtime_error, with what to do, if a process cannot be watched.
  explicit PeerProcesses(const std::vector<pid_t>& pids);

  bool has_exited(int rank) const;

 private:
  std::vector<std::shared_ptr<const WatchedProcess>> processes_;  // by rank; null: this one, or not here
};

}  // namespace commlib
