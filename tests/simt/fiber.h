// Fibers: stacks that one OS thread switches between, known to AddressSanitizer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace simt {

struct Stack {
  std::byte* base = nullptr;  // lowest address, above the guard page
  size_t bytes = 0;
};

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the fiber from where it stands until it suspends or finishes. The first time it takes a stack and
  // calls `entry`, which must call finish() instead of returning.
  void resume(size_t stack_bytes, void (*entry)());

  // On the fiber itself: back to the caller of resume().
  void suspend();
  [[noreturn]] void finish();

  // Whether p is on its stack.
  bool holds(const void* p) const {
    const auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(stack_.base);
    return at >= base && at - base < stack_.bytes;
  }

  // Gives the stack back; a fiber that has not finished is dropped where it stands.
  void release();

 private:
  struct Context;

  void prepare(void (*entry)());
  void leave(bool for_good);

  Stack stack_;
  std::unique_ptr<Context> context_;
  void* fake_stack_ = nullptr;  // AddressSanitizer's, while the fiber is suspended
  bool finished_ = false;
};

}  // namespace simt
