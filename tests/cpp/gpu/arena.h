// Tensors' memory, taken from CUDA once: taking or returning it later may wait for every kernel that runs,
// and a kernel may be waiting for the very rank that asks.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <string>

namespace commlib::testing {

class Arena {
 public:
  // Pinned host memory, or managed memory, of device 0. Throws std::runtime_error.
  void open(size_t bytes, bool managed);

  void* take(size_t bytes);
  void give_back(void* memory);
  bool has(const void* address) const;
  // Reports writes past the end of what was taken, seen when it was given back; "": none since the last call.
  std::string take_overruns();

 private:
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
  std::mutex mutex_;               // guards the members below it
  std::map<size_t, size_t> free_;  // offset: bytes
  std::map<size_t, size_t> used_;  // offset: bytes asked for
  std::string overruns_;
};

}  // namespace commlib::testing
