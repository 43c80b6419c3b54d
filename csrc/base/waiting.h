// How threads of the host wait.
#pragma once

#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace commlib {

inline void cpu_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline double monotonic_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// How long a wait burns its core before it sleeps in the kernel. With a core for each thread the peer
// answers within microseconds, so spin; with more threads than cores it may need this very core.
struct SpinPolicy {
  int pauses = 2000;
  int yields = 20;
};

// Called by a sleeping thread of the user every nap, and with `signalled` at once when a signal has come to
// it; true: the user wants out (Ctrl-C).
using InterruptCheck = bool (*)(bool signalled);
struct Interrupted {};

constexpr double kNapSeconds = 0.02;  // between two looks at whether a peer still lives

}  // namespace commlib
