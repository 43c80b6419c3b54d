// Bell: how a thread sleeps until a word in its rank's control block changes, also across processes.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdint>

#include "backend/waiting.h"
#include "protocol/words.h"

namespace commlib {

inline double monotonic_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// No wake-up is lost. A ringer changes its word (release), then adds to `rings`, then reads `sleepers`; a
// sleeper adds to `sleepers`, then reads `rings`, then its word, and sleeps only while `rings` has not moved.
// All four are sequentially consistent: a ringer who sees no sleeper comes before that sleeper's read of
// `rings`, which therefore sees the new value and, through it, the new word.
inline void ring(Bell& bell) {
  __atomic_fetch_add(&bell.rings, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&bell.sleepers, __ATOMIC_SEQ_CST) != 0) {
    syscall(SYS_futex, &bell.rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

// Waits until ready(). Each nap at the latest, and when a signal has come to this thread, it calls
// give_up(signalled), and returns false when that says true.
template <class Ready, class GiveUp>
bool wait_on(Bell& bell, const SpinPolicy& spin, Ready ready, GiveUp give_up) {
  for (int i = 0; i < spin.pauses; ++i) {
    if (ready()) return true;
    cpu_pause();
  }
  for (int i = 0; i < spin.yields; ++i) {
    if (ready()) return true;
    sched_yield();
  }
  const timespec nap{0, static_cast<long>(kNapSeconds * 1e9)};
  double next_look = monotonic_seconds() + kNapSeconds;
  for (;;) {
    __atomic_fetch_add(&bell.sleepers, 1, __ATOMIC_SEQ_CST);
    const uint32_t heard = __atomic_load_n(&bell.rings, __ATOMIC_SEQ_CST);
    const bool done = ready();
    const bool signalled =
        !done && syscall(SYS_futex, &bell.rings, FUTEX_WAIT, heard, &nap, nullptr, 0) < 0 && errno == EINTR;
    __atomic_fetch_sub(&bell.sleepers, 1, __ATOMIC_SEQ_CST);
    if (done || ready()) return true;
    // The bell may ring for another word: the clock, not the number of rings, says when to look.
    if (!signalled && monotonic_seconds() < next_look) continue;
    if (give_up(signalled)) return ready();
    next_look = monotonic_seconds() + kNapSeconds;
  }
}

}  // namespace commlib
