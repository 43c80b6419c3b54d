// The throttle of a rank on the CPU: protocol/throttle.h over the monotonic clock.
#pragma once

#include <time.h>

#include <atomic>

#include "protocol/throttle.h"

namespace commlib {

class Throttle {
 public:
  explicit Throttle(double gbytes_per_s) : rate_(ThrottleRate::of(gbytes_per_s)) {}

  bool limited() const { return rate_.fs_per_byte != 0; }
  // Takes the time of `bytes`, after what other workers have taken, and waits for its end. Sleeps
  // are as coarse as the kernel's timer, so it does not wait for a near end: the next rows do.
  void pass(int64_t bytes) {
    uint64_t free = free_.load(std::memory_order_relaxed), end;
    const uint64_t now = now_ns();
    do {
      end = rate_.end_of(bytes, now, free);
    } while (!free_.compare_exchange_weak(free, end, std::memory_order_relaxed));
    if (end < now + kNearNs) return;
    const timespec nap{static_cast<time_t>((end - now) / 1'000'000'000),
                       static_cast<long>((end - now) % 1'000'000'000)};
    nanosleep(&nap, nullptr);
  }

 private:
  static constexpr uint64_t kNearNs = 100'000;
  static uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(t.tv_nsec);
  }

  const ThrottleRate rate_;
  // When everything that workers have passed is through. Only a time: orders nothing (relaxed).
  std::atomic<uint64_t> free_{0};
};

}  // namespace commlib
