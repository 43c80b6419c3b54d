#include "arena.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <iterator>
#include <new>
#include <stdexcept>
#include <utility>

#include "cuda/driver.h"

namespace commlib::testing {
namespace {

constexpr size_t kLine = 64;
constexpr int kUntouched = 0xfd;  // what lies behind each part, one line at least

size_t with_margin(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine + kLine; }

}  // namespace

void Arena::open(size_t bytes, bool managed) {
  void* p = nullptr;
  if (managed) {
    int at_once = 0;  // host and kernels may both use it
    cuda::check(cudaDeviceGetAttribute(&at_once, cudaDevAttrConcurrentManagedAccess, 0),
                "cudaDeviceGetAttribute");
    if (!at_once) throw std::runtime_error("the host cannot use this GPU's managed memory beside a kernel");
    cuda::check(cudaMallocManaged(&p, bytes, cudaMemAttachGlobal), "cudaMallocManaged");
  } else {
    cuda::check(cudaHostAlloc(&p, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc",
                "Is locked memory limited (ulimit -l)?");
    void* there = nullptr;
    cuda::check(cudaHostGetDevicePointer(&there, p, 0), "cudaHostGetDevicePointer");
    if (there != p) throw std::runtime_error("the device has pinned memory at another address than the host");
  }
  base_ = static_cast<std::byte*>(p);
  bytes_ = bytes;
  std::lock_guard<std::mutex> lock(mutex_);
  free_[0] = bytes;
}

// The first that fits.
void* Arena::take(size_t bytes) {
  const size_t whole = with_margin(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  auto part = free_.begin();
  while (part != free_.end() && part->second < whole) ++part;
  if (part == free_.end()) throw std::bad_alloc();
  const size_t at = part->first, left = part->second - whole;
  free_.erase(part);
  if (left > 0) free_[at + whole] = left;
  used_[at] = bytes;
  std::memset(base_ + at + bytes, kUntouched, whole - bytes);
  return base_ + at;
}

void Arena::give_back(void* memory) {
  if (!memory) return;
  const auto at = static_cast<size_t>(static_cast<std::byte*>(memory) - base_);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto part = used_.find(at);
  const size_t bytes = part->second;
  size_t whole = with_margin(bytes);
  for (size_t i = bytes; i < whole; ++i) {
    if (base_[at + i] == static_cast<std::byte>(kUntouched)) continue;
    overruns_ += "byte " + std::to_string(i) + " of a tensor of " + std::to_string(bytes) + " was written. ";
    break;
  }
  used_.erase(part);
  auto next = free_.lower_bound(at);
  if (next != free_.end() && next->first == at + whole) {
    whole += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == at) {
      before->second += whole;
      return;
    }
  }
  free_[at] = whole;
}

bool Arena::has(const void* address) const {
  const auto* p = static_cast<const std::byte*>(address);
  return p >= base_ && p < base_ + bytes_;
}

std::string Arena::take_overruns() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(overruns_, "");
}

}  // namespace commlib::testing
