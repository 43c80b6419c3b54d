// EventCount: a thread sleeps on it until another, of this process or one that maps the same memory, has
// changed a word.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdint>

#include "base/waiting.h"

namespace commlib {

// Lies beside the words that it is about. Unused on a GPU, whose threads poll.
struct EventCount {
  uint32_t events = 0;
  uint32_t sleepers = 0;
};

// No wake-up is lost. A notifier changes its word (release), then adds to `events`, then reads `sleepers`; a
// sleeper adds to `sleepers`, then reads `events`, then its word, and sleeps only while `events` has not
// moved. All four are sequentially consistent: a notifier that sees no sleeper comes before that sleeper's
// read of `events`, which therefore sees the new value and, through it, the new word.
inline void notify(EventCount& count) {
  __atomic_fetch_add(&count.events, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&count.sleepers, __ATOMIC_SEQ_CST) != 0) {
    syscall(SYS_futex, &count.events, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

// Waits until ready(). Calls give_up(signalled) each nap at the latest, and when a signal has come to this
// thread; when that returns true, the last ready() decides what it returns.
template <class Ready, class GiveUp>
bool wait_on(EventCount& count, const SpinPolicy& spin, Ready ready, GiveUp give_up) {
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
    __atomic_fetch_add(&count.sleepers, 1, __ATOMIC_SEQ_CST);
    const uint32_t seen = __atomic_load_n(&count.events, __ATOMIC_SEQ_CST);
    const bool done = ready();
    const bool signalled =
        !done && syscall(SYS_futex, &count.events, FUTEX_WAIT, seen, &nap, nullptr, 0) < 0 && errno == EINTR;
    __atomic_fetch_sub(&count.sleepers, 1, __ATOMIC_SEQ_CST);
    if (done || ready()) return true;
    // The event may be about another word: the clock, not the number of events, says when to look.
    if (!signalled && monotonic_seconds() < next_look) continue;
    if (give_up(signalled)) return ready();
    next_look = monotonic_seconds() + kNapSeconds;
  }
}

}  // namespace commlib
