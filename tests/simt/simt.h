// Runs CUDA kernels on the CPU: each thread of each block is a fiber, and a seed decides which runs when.
// Kernel sources include cuda/ptx.cuh, compiled with -DCOMMLIB_SIMT; tests include this file. See README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace simt {

struct Config {
  uint64_t seed = 1;               // the whole run follows from it
  int preempt = 16;                // 1 in this many accesses through ptx:: lets others run first; 0: none
  bool delay_stores = false;       // weak mode: ptx::store_global lands late unless a release orders it
  bool time_leaps = true;          // false: it passes about as the host's does, beside which the machine runs
  bool find_races = false;         // accesses that nothing orders are errors, whether or not they went wrong
  int sms = 1 << 30;               // blocks that can be resident at a time, of all streams together
  size_t stack_bytes = 128 << 10;  // of a fiber; only what it touches takes memory
  uint64_t time_limit_ns = 3'600'000'000'000;  // virtual: polling for longer is a deadlock
  uint64_t max_switches = 200'000'000;         // against endless loops that do change memory
};

struct Result {
  std::string error;  // what went wrong, in which thread, and the seed; empty if every kernel ended
  uint64_t seed;
  uint64_t switches;    // between fibers
  uint64_t virtual_ns;  // the last value of globaltimer()

  bool ok() const { return error.empty(); }
};

class Machine;

// Kernels of one stream run in order, those of different streams at the same time. A rank is a stream.
class Simulation {
 public:
  explicit Simulation(const Config& config);
  ~Simulation();

  // Queues a kernel; each of its grid * block threads calls `body`, which should own no memory, because
  // threads are dropped where they stand once something has failed.
  void launch(int stream, unsigned grid, unsigned block, size_t shared_bytes, std::function<void()> body);

  // Runs all that was launched to its end, or to the first error. After an error nothing can be launched.
  Result run();

 private:
  std::unique_ptr<Machine> machine_;
};

}  // namespace simt
