// Memory for tensors: operations need theirs where the backend's kernels reach it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace commlib::testing {

// Defined by each backend. Host and kernels reach the memory at the same address. Waits for no operation.
void* allocate(size_t bytes);  // aligned to a cache line
void release(void* memory);
// Copies between any two addresses, in tensors or slots of a heap; done when it returns.
void copy_bytes(void* to, const void* from, size_t bytes);

template <class T>
struct Reachable {
  using value_type = T;
  Reachable() = default;
  template <class U>
  Reachable(const Reachable<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(testing::allocate(n * sizeof(T))); }
  void deallocate(T* p, size_t) { release(p); }
  friend bool operator==(const Reachable&, const Reachable&) { return true; }
  friend bool operator!=(const Reachable&, const Reachable&) { return false; }
};

using Int64s = std::vector<int64_t, Reachable<int64_t>>;
using Bytes = std::vector<std::byte, Reachable<std::byte>>;

}  // namespace commlib::testing
