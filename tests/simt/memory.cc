// Words, 16-byte accesses, and weak mode: stores that land late.
//
// A GPU may show a thread's plain stores to others in any order and at any time until a release orders them.
// In weak mode a store is therefore put aside with the set of threads that know it: its own, and those that
// __syncwarp or __syncthreads brought up to date. It lands at a random moment, at the latest when one who
// knows it releases, or touches the same 16 bytes.
#include <algorithm>
#include <cstring>

#include "simt/machine.h"

namespace simt {
namespace {

constexpr size_t kMostDelayed = 512;  // in a block: then each new one makes a random one land
constexpr uintptr_t kGranule = 16;    // no access of the kernels crosses such a boundary

uintptr_t granule(const void* p) { return reinterpret_cast<uintptr_t>(p) / kGranule; }

bool knows(const Thread& t, const DelayedStore& store) {
  return store.block_knows || (store.warp == t.warp() && (store.lanes >> t.lane() & 1));
}

// Memory that this thread is about to touch has what it knows to be stored there.
void land_known_at(const void* p) {
  Block& block = *self->block;
  if (block.delayed_at[granule(p) % block.delayed_at.size()] == 0) return;
  for (size_t i = block.delayed.size(); i-- > 0;) {
    const DelayedStore& store = block.delayed[i];
    if (granule(store.to) == granule(p) && knows(*self, store)) land(block, i);
  }
}

void delay(void* p, const void* value, unsigned bytes) {
  Block& block = *self->block;
  if (block.delayed.size() >= kMostDelayed) land(block, machine->random.below(block.delayed.size()));
  DelayedStore store{static_cast<std::byte*>(p), {}, bytes, self->warp(), 1u << self->lane(), false};
  std::memcpy(store.value, value, bytes);
  block.delayed.push_back(store);
  ++block.delayed_at[granule(p) % block.delayed_at.size()];
  ++machine->delayed;
}

void write(void* p, const void* value, unsigned bytes) {
  if (std::memcmp(p, value, bytes) == 0) return;  // nothing that a polling thread could wait for
  std::memcpy(p, value, bytes);
  ++machine->changes;
}

void check_global(const void* p, size_t bytes, const char* what) {
  check_aligned(p, bytes, what);
  if (self->block->has_shared(p, bytes))
    machine->fail(std::string(what) + ": " + hex(p) + " is shared memory");
}

void begin_access(const void* p, size_t bytes, const char* what) {
  machine->preempt();
  check_global(p, bytes, what);
  if (machine->config.delay_stores) land_known_at(p);
}

void store(void* p, const void* value, unsigned bytes, const char* what) {
  begin_access(p, bytes, what);
  if (!machine->config.delay_stores) return write(p, value, bytes);
  // An address out of bounds is to be reported now, with the stack of who stored.
  std::byte now[16];
  std::memcpy(now, p, bytes);
  delay(p, value, bytes);
}

}  // namespace

void check_aligned(const void* p, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % alignment == 0) return;
  machine->fail(std::string(what) + ": " + hex(p) + " is not a multiple of " + std::to_string(alignment));
}

void land(Block& block, size_t i) {
  DelayedStore& store = block.delayed[i];
  write(store.to, store.value, store.bytes);
  --block.delayed_at[granule(store.to) % block.delayed_at.size()];
  store = block.delayed.back();
  block.delayed.pop_back();
  --machine->delayed;
}

void land_known_to(const Thread& thread) {
  Block& block = *thread.block;
  for (size_t i = block.delayed.size(); i-- > 0;) {
    if (knows(thread, block.delayed[i])) land(block, i);
  }
}

void share_with_lanes(Block& block, unsigned warp, uint32_t lanes) {
  for (DelayedStore& store : block.delayed) {
    if (store.warp == warp && (store.lanes & lanes)) store.lanes |= lanes;
  }
}

void share_with_block(Block& block) {
  for (DelayedStore& store : block.delayed) store.block_knows = true;
}

// -- words
// ------------------------------------------------------------------------------------------------------

uint64_t load_acquire(const uint64_t* word) {
  begin_access(word, sizeof(*word), "load_acquire");
  const uint64_t v = *word;
  machine->look(word, v);
  return v;
}

void store_release(uint64_t* word, uint64_t v) {
  begin_access(word, sizeof(*word), "store_release");
  land_known_to(*self);
  write(word, &v, sizeof(v));
}

uint64_t add_release(uint64_t* word, uint64_t v) {
  begin_access(word, sizeof(*word), "add_release");
  land_known_to(*self);
  const uint64_t old = *word;
  const uint64_t sum = old + v;
  write(word, &sum, sizeof(sum));
  return old;
}

uint64_t exchange_if(uint64_t* word, uint64_t expected, uint64_t desired) {
  begin_access(word, sizeof(*word), "exchange_if");
  land_known_to(*self);
  const uint64_t old = *word;
  if (old == expected) {
    write(word, &desired, sizeof(desired));
  } else {
    machine->look(word, old);  // a loop around it polls
  }
  return old;
}

void add_relaxed(uint32_t* word, uint32_t v) {
  begin_access(word, sizeof(*word), "add_relaxed");
  const uint32_t sum = *word + v;
  write(word, &sum, sizeof(sum));
}

void min_relaxed(int64_t* word, int64_t v) {
  begin_access(word, sizeof(*word), "min_relaxed");
  const int64_t least = std::min(*word, v);
  write(word, &least, sizeof(least));
}

void store_relaxed(uint64_t* word, uint64_t v) { store(word, &v, sizeof(v), "store_relaxed"); }

// -- 16-byte accesses
// -------------------------------------------------------------------------------------------

void load_global_16(void* to, const void* p) {
  begin_access(p, 16, "load_global");
  std::memcpy(to, p, 16);
}

void store_global_16(void* p, const void* from) { store(p, from, 16, "store_global"); }

void load_shared_16(void* to, const void* p) {
  machine->preempt();
  check_aligned(p, 16, "load_shared");
  if (!self->block->has_shared(p, 16)) machine->fail("load_shared: " + hex(p) + " is not in shared memory");
  std::memcpy(to, p, 16);
}

std::byte* dynamic_shared() { return self->block->shared; }

// -- time
// -------------------------------------------------------------------------------------------------------

uint64_t globaltimer() {
  machine->preempt();
  return ++machine->now;
}

void nanosleep(uint32_t ns) { machine->sleep(ns); }

}  // namespace simt
