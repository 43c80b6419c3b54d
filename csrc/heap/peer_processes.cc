#include "heap/peer_processes.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace commlib {
namespace {

// When a process started, in ticks since the host did; 0: it has ended. This is the 22nd field of its line in
// /proc; the third is Z where it has ended and only its parent has not noticed. The second, its name, stands
// in parentheses and may hold anything.
uint64_t start_of(pid_t pid) {
  char line[1024] = {};
  const std::string path = "/proc/" + std::to_string(pid) + "/stat";
  FILE* file = std::fopen(path.c_str(), "re");
  if (!file) return errno == ENOENT || errno == ESRCH ? 0 : 1;
  const size_t length = std::fread(line, 1, sizeof line - 1, file);
  std::fclose(file);
  const char* rest = length ? std::strrchr(line, ')') : nullptr;
  if (!rest) return 0;
  char state = 'Z';
  unsigned long long start = 0;
  std::sscanf(rest + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
              &state, &start);
  return state == 'Z' || state == 'X' ? 0 : start;
}

}  // namespace

// Watches through a pidfd, which a reused pid cannot confuse. Old kernels have none, and profiles of
// containers may forbid it: then by the time at which the process started, which tells two processes of one
// pid apart. All communicators of this process share one for each other process: otherwise, with a model of
// many layers, descriptors would run out.
class WatchedProcess {
 public:
  static std::shared_ptr<const WatchedProcess> of(pid_t pid) {
    static std::mutex mutex;
    static std::map<pid_t, std::weak_ptr<const WatchedProcess>> watched;
    std::lock_guard<std::mutex> lock(mutex);
    auto known = watched[pid].lock();
    if (known && !known->has_exited()) return known;  // else another process may have the pid by now
    auto made = std::make_shared<const WatchedProcess>(pid);
    watched[pid] = made;
    return made;
  }

  explicit WatchedProcess(pid_t pid) : pid_(pid), fd_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))) {
    if (fd_ >= 0) return;
    if (errno == EMFILE || errno == ENFILE) {
      throw std::runtime_error(std::string("cannot watch the process of another rank (pidfd_open): ") +
                               std::strerror(errno) +
                               ". Raise the limit of open files (ulimit -n), or close communicators");
    }
    start_ = start_of(pid);
  }
  ~WatchedProcess() {
    if (fd_ >= 0) close(fd_);
  }
  WatchedProcess(const WatchedProcess&) = delete;
  WatchedProcess& operator=(const WatchedProcess&) = delete;

  bool has_exited() const {
    if (fd_ < 0) return start_ == 0 || start_of(pid_) != start_;
    pollfd p{fd_, POLLIN, 0};
    return poll(&p, 1, 0) == 1;
  }

 private:
  const pid_t pid_;
  const int fd_;
  uint64_t start_ = 0;  // without a pidfd only
};

PeerProcesses::PeerProcesses(const std::vector<pid_t>& pids) {
  for (const pid_t pid : pids) {
    const bool other = pid != getpid() && pid != kNotHere;
    processes_.push_back(other ? WatchedProcess::of(pid) : nullptr);
  }
}

bool PeerProcesses::has_exited(int rank) const { return processes_[rank] && processes_[rank]->has_exited(); }

}  // namespace commlib
