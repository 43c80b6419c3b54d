// Which process something belongs to.
#pragma once

#include <pthread.h>
#include <sys/types.h>
#include <unistd.h>

namespace commlib {

// A forked child has a copy of its parent's memory, but none of its threads, and its locks as they were at
// that moment: it may neither use nor end what is its parent's. One question, asked before any lock is taken.
class HomeProcess {
 public:
  bool is_here() const { return home_ == this_process(); }
  pid_t id() const { return home_; }

 private:
  // Asked of the kernel once, and again in each child while it has one thread.
  static pid_t& this_process() {
    static pid_t id = getpid();
    static const int watching = pthread_atfork(nullptr, nullptr, [] { this_process() = getpid(); });
    static_cast<void>(watching);
    return id;
  }

  pid_t home_ = this_process();
};

}  // namespace commlib
