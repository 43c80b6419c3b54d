// How the host waits for words that kernels write into mapped memory.
#pragma once

#include <sched.h>
#include <time.h>

#include <cstdint>

#include "base/waiting.h"
#include "base/words.h"

namespace commlib::cuda {

// Spins, then yields, then sleeps: a kernel's answer takes microseconds, or as long as the work that it is
// queued behind; a missing rank's never comes. A sleep of any length costs 50 µs and more.
class HostWait {
 public:
  explicit HostWait(SpinPolicy spin) : spin_(spin) {}

  // Waits a little; true every nap: time to look around.
  bool pause() {
    ++calls_;
    if (calls_ <= spin_.pauses) {
      cpu_pause();
      return false;
    }
    if (calls_ <= spin_.pauses + spin_.yields) {
      sched_yield();
      return false;
    }
    const timespec tick{0, kTickNs};
    nanosleep(&tick, nullptr);
    constexpr int64_t ticks_per_nap = static_cast<int64_t>(kNapSeconds * 1e9) / kTickNs;
    return (calls_ - spin_.pauses - spin_.yields) % ticks_per_nap == 0;
  }

 private:
  static constexpr long kTickNs = 50'000;
  const SpinPolicy spin_;
  int64_t calls_ = 0;
};

}  // namespace commlib::cuda
