// Ordinary C++ accesses of kernels compiled with g++ -fsanitize=thread, which calls these functions before
// each one, without a library. They are preemption points, and checked for races.
#include <cstddef>

#include "simt/machine.h"

namespace simt {

// Whether this program has such kernels: where it has, cudart.h defines another one.
__attribute__((weak)) bool accesses_are_seen() { return false; }

namespace {

constexpr int kRarer = 8;  // preemption than at ptx::

void access(const void* p, size_t bytes, Races::Kind kind, const void* code) {
  if (!on_machine || !self || !machine->races || self->fiber.holds(p)) return;
  machine->preempt(kRarer);
  machine->races->access(*self, p, bytes, kind, code);
}

}  // namespace
}  // namespace simt

#define SIMT_READ(name, bytes) \
  void name(void* p) { simt::access(p, bytes, simt::Races::read, __builtin_return_address(0)); }
#define SIMT_WRITE(name, bytes) \
  void name(void* p) { simt::access(p, bytes, simt::Races::write, __builtin_return_address(0)); }

extern "C" {

SIMT_READ(__tsan_read1, 1)
SIMT_READ(__tsan_read2, 2)
SIMT_READ(__tsan_read4, 4)
SIMT_READ(__tsan_read8, 8)
SIMT_READ(__tsan_read16, 16)
SIMT_READ(__tsan_unaligned_read2, 2)
SIMT_READ(__tsan_unaligned_read4, 4)
SIMT_READ(__tsan_unaligned_read8, 8)
SIMT_READ(__tsan_unaligned_read16, 16)
SIMT_WRITE(__tsan_write1, 1)
SIMT_WRITE(__tsan_write2, 2)
SIMT_WRITE(__tsan_write4, 4)
SIMT_WRITE(__tsan_write8, 8)
SIMT_WRITE(__tsan_write16, 16)
SIMT_WRITE(__tsan_unaligned_write2, 2)
SIMT_WRITE(__tsan_unaligned_write4, 4)
SIMT_WRITE(__tsan_unaligned_write8, 8)
SIMT_WRITE(__tsan_unaligned_write16, 16)
SIMT_WRITE(__tsan_vptr_update, 8)

void __tsan_read_range(void* p, size_t bytes) {
  simt::access(p, bytes, simt::Races::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  simt::access(p, bytes, simt::Races::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"
