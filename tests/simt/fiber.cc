#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT  // -DSIMT_UCONTEXT tries it elsewhere too: slower, a system call per switch
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#define ASAN_UNPOISON_MEMORY_REGION(base, bytes) (static_cast<void>(base), static_cast<void>(bytes))
#endif

#ifndef SIMT_UCONTEXT
// simt_switch(&save, to): pushes what a callee must keep, leaves the stack pointer in `save`, goes on at
// `to`.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {
namespace {

constexpr size_t kGuardBytes = 4096;

std::vector<Stack> free_stacks;  // kept between simulations: hundreds of seeds use the same ones

Stack take_stack(size_t bytes) {
  if (!free_stacks.empty() && free_stacks.back().bytes == bytes) {
    const Stack stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* all = mmap(nullptr, kGuardBytes + bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  mprotect(all, kGuardBytes, PROT_NONE);  // if mappings run out, it goes without a guard
  return {static_cast<std::byte*>(all) + kGuardBytes, bytes};
}

// Where the scheduler's own stack lies: AddressSanitizer must know on the way back to it.
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

void (*entry_of_new_fiber)() = nullptr;

void begin() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  entry_of_new_fiber();
  std::abort();  // entry must not return
}

}  // namespace

#ifdef SIMT_UCONTEXT
struct Fiber::Context {
  ucontext_t fiber, scheduler;

  void begin_on(const Stack& stack) {
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = stack.base;
    fiber.uc_stack.ss_size = stack.bytes;
    fiber.uc_link = nullptr;
    makecontext(&fiber, begin, 0);
  }
  void enter() { swapcontext(&scheduler, &fiber); }
  void leave() { swapcontext(&fiber, &scheduler); }
};
#else
struct Fiber::Context {
  void* fiber;
  void* scheduler;

  // A stack as simt_switch leaves one: six registers, and `begin` to return to. Tops differ from stack to
  // stack, otherwise all fibers would compete for the same few sets of the caches.
  void begin_on(const Stack& stack) {
    constexpr int kRegisters = 6;
    static size_t colour = 0;
    colour = (colour + 1) % 61;
    auto* top = reinterpret_cast<uintptr_t*>(stack.base + stack.bytes - 56 - colour * 64);
    *top = 0;  // no caller: backtraces end here; 8 modulo 16, as after any call
    *--top = reinterpret_cast<uintptr_t>(&begin);
    for (int i = 0; i < kRegisters; ++i) *--top = 0;
    fiber = top;
  }
  void enter() { simt_switch(&scheduler, fiber); }
  void leave() { simt_switch(&fiber, scheduler); }
};
#endif

Fiber::Fiber() = default;
Fiber::~Fiber() { release(); }

void Fiber::prepare(void (*entry)()) {
  context_ = std::make_unique<Context>();
  context_->begin_on(stack_);
  entry_of_new_fiber = entry;
}

void Fiber::resume(size_t stack_bytes, void (*entry)()) {
  if (!context_) {
    stack_ = take_stack(stack_bytes);
    prepare(entry);
  }
  void* scheduler_fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_.base, stack_.bytes);
  context_->enter();
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void Fiber::leave(bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler_stack, scheduler_stack_bytes);
  context_->leave();
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack, &scheduler_stack_bytes);
}

void Fiber::suspend() { leave(false); }

void Fiber::finish() {
  finished_ = true;
  leave(true);
  std::abort();  // a finished fiber is not resumed
}

void Fiber::release() {
  if (!stack_.base) return;
  // A dropped fiber leaves the red zones of its frames behind.
  if (!finished_) ASAN_UNPOISON_MEMORY_REGION(stack_.base, stack_.bytes);
  free_stacks.push_back(stack_);
  stack_ = {};
  context_.reset();
}

}  // namespace simt
