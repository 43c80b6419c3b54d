#include "cpu/buffers.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace commlib {

BufferPool::~BufferPool() {
  for (const Buffer& b : idle_) munmap(b.data, b.bytes);
}

std::shared_ptr<void> BufferPool::take(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  bytes = (std::max<size_t>(bytes, 1) + kHugePage - 1) / kHugePage * kHugePage;
  Buffer found{nullptr, 0};
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      // A buffer much larger than needed stays for results that need it.
      if (it->bytes < bytes || it->bytes > 2 * bytes) continue;
      found = *it;
      idle_.erase(it);
      break;
    }
  }
  if (!found.data) {
    // A margin, so that the next batch, a little larger, fits as well.
    found.bytes = bytes + bytes / 8 / kHugePage * kHugePage;
    found.data = mmap(nullptr, found.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found.data == MAP_FAILED) throw std::bad_alloc();
    madvise(found.data, found.bytes, MADV_HUGEPAGE);  // only a hint
  }
  auto self = shared_from_this();
  return std::shared_ptr<void>(found.data, [self, found](void*) { self->give_back(found); });
}

void BufferPool::give_back(Buffer buffer) {
  if (!home_.is_here()) return;  // a forked child's copy, which goes with it
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(buffer);
  if (idle_.size() <= kMaxIdle) return;
  munmap(idle_.front().data, idle_.front().bytes);
  idle_.erase(idle_.begin());
}

size_t BufferPool::idle_bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t sum = 0;
  for (const Buffer& b : idle_) sum += b.bytes;
  return sum;
}

}  // namespace commlib
