// A thread of the process that looks, ten times a second, for what kernels that wait cannot see: the death of
// a peer. The host may be anywhere meanwhile, in a copy of PyTorch's for example.
#pragma once

#include <functional>

namespace commlib::cuda {

// Has that thread call `look` as long as this lives; once this is destroyed, no call is under way. `look`
// must be quick and take no locks of others, above all not the interpreter's. The thread starts with the
// first Watch and ends with the last. In a child of fork() there is no thread, and nothing is waited for.
class Watch {
 public:
  explicit Watch(std::function<void()> look);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  friend class Watcher;
  const std::function<void()> look_;
  const int process_;
};

}  // namespace commlib::cuda
