// Bell: how a thread sleeps until a word in its rank's control block changes, also across processes.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace commlib {

// No wake-up is lost. A ringer changes its word (release), then adds to `rings`, then reads `sleepers`; a
// sleeper adds to `sleepers`, then reads `rings`, then its word, and sleeps only while `rings` has not moved.
// All four are sequentially consistent: a ringer who sees no sleeper comes before that sleeper's read of
// `rings`, which therefore sees the new value and, through it, the new word.
struct alignas(64) Bell {
  std::atomic<uint32_t> rings{0};
  std::atomic<uint32_t> sleepers{0};
};

inline double monotonic_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

inline void ring(Bell& bell) {
  bell.rings.fetch_add(1, std::memory_order_seq_cst);
  if (bell.sleepers.load(std::memory_order_seq_cst) != 0) {
    syscall(SYS_futex, &bell.rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

inline void cpu_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long a wait burns its core before it sleeps in the kernel. With a core for each thread the peer
// answers within microseconds, so spin; with more threads than cores it may need this very core.
struct SpinPolicy {
  int pauses = 2000;
  int yields = 20;
};

constexpr double kNapSeconds = 0.02;  // between two looks at whether a peer still lives

// Waits until ready(). Each nap at the latest it calls give_up(), and returns false when that says true.
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
    bell.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t heard = bell.rings.load(std::memory_order_seq_cst);
    const bool done = ready();
    if (!done) syscall(SYS_futex, &bell.rings, FUTEX_WAIT, heard, &nap, nullptr, 0);
    bell.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (done || ready()) return true;
    // The bell rings for every word of the block: the clock, not the number of rings, says when to look.
    if (monotonic_seconds() < next_look) continue;
    if (give_up()) return ready();
    next_look = monotonic_seconds() + kNapSeconds;
  }
}

}  // namespace commlib
