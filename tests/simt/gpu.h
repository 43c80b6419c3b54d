// A simulated GPU that runs while threads of the host use it: kernels start when they are launched, and time
// is real.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "simt/simt.h"

namespace simt {

class Gpu {
 public:
  explicit Gpu(const Config& config);  // kernels run on a thread of its own
  ~Gpu();                              // drops kernels that have not ended
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  // From any thread. `mapped`: what map() returned, if the kernel may write there.
  void launch(int stream, unsigned grid, unsigned block, size_t shared_bytes, std::function<void()> body,
              const void* mapped = nullptr);
  bool idle(int stream);         // whether all kernels of the stream have ended
  void synchronize(int stream);  // returns when they have, or when an error was reported
  void synchronize();            // waits for all that was launched before, on all streams
  std::string error();           // what went wrong, in which thread, and the seed; or empty

  // How kernels see this host memory: as it is, or in weak mode through a view of their own. May be called
  // again.
  void* map(void* host, size_t bytes);
  // From now on all kernels see what the host has written while none saw this memory.
  void renew(void* host);
  void unmap(void* host);

  const Config config;

 private:
  class Doorman;

  void post(std::function<void(Machine&)> request);
  void run();

  // Of one stream: kernels launched and ended so far.
  struct Progress {
    uint64_t launched = 0, ended = 0;
  };
  void await(std::unique_lock<std::mutex>& lock, const std::function<bool()>& done);

  std::mutex mutex_;                 // guards the members below it
  std::condition_variable come_;     // requests_ and off_ have changed
  std::condition_variable gone_on_;  // progress_ and error_ have
  std::deque<std::function<void(Machine&)>> requests_;
  bool off_ = false;
  std::map<int, Progress> progress_;
  std::map<void*, std::unique_ptr<std::byte[]>> views_;  // by the host memory that they show
  std::string error_;

  std::thread thread_;  // last: it uses the others
};

}  // namespace simt
