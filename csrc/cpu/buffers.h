// Memory of owned results. The page faults of a fresh mapping of 50 MB cost more than the copy into it, so
// results go back to a small pool when their tensors die, as with a caching allocator on a GPU.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "base/home_process.h"

namespace commlib {

class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  ~BufferPool();

  // At least `bytes` bytes, 4096-aligned, contents undefined; goes back to the pool when the last owner lets
  // go. Throws std::bad_alloc.
  std::shared_ptr<void> take(size_t bytes);
  size_t idle_bytes();

 private:
  struct Buffer {
    void* data;
    size_t bytes;
  };
  void give_back(Buffer buffer);

  static constexpr size_t kMaxIdle = 4;
  const HomeProcess home_;
  std::mutex mutex_;
  std::vector<Buffer> idle_;  // oldest first
};

}  // namespace commlib
