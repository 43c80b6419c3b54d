// Ends a test that takes too long, and prints where every thread is.
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

#include "cuda/state.h"

namespace commlib::testing {

// The words through which this rank's kernels speak to the host: printed when a test hangs.
void watch_rank(int rank, const cuda::HostState* state);
void forget_ranks();

class Watchdog {
 public:
  Watchdog();
  ~Watchdog();

  // From now on, `seconds` for this test; then every thread's stack is printed and the program ends with 3.
  void watch(const std::string& test, double seconds);
  void rest();

 private:
  void run();

  std::mutex mutex_;  // guards the members below it
  std::condition_variable changed_;
  std::string test_;  // "": none
  double seconds_ = 0;
  uint64_t watches_ = 0;
  bool over_ = false;
  std::thread thread_;
};

}  // namespace commlib::testing
