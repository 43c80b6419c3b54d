// Words, 16-byte accesses, and weak mode: stores that land late.
//
// A GPU may show a thread's plain stores to others in any order and at any time until a release orders them.
// In weak mode a store is therefore put aside with the set of threads that know it: its own, and those that
// __syncwarp or __syncthreads brought up to date. It lands at a random moment, at the latest when a thread
// that knows it releases, or touches the same 16 bytes.
//
// Threads of the host read host memory that kernels see at any time, so there ordinary C++ stores count too.
// It has two views: what a thread has written into the device's is noticed when it next lets others run,
// shares or releases, and goes to the host's as a store that is put aside.
#include <algorithm>
#include <cstring>

#include "simt/machine.h"

namespace simt {
namespace {

constexpr size_t kMostDelayed = 512;          // in a block: from then on each new one makes a random one land
constexpr uintptr_t kGranule = 16;            // no access of the kernels crosses such a boundary
constexpr size_t kMostNsToHost = 20'000'000;  // of a store: the host's threads need time to miss it

uintptr_t granule(const void* p) { return reinterpret_cast<uintptr_t>(p) / kGranule; }

bool knows(const Thread& t, const DelayedStore& store) {
  return store.block_knows || (store.warp == t.warp() && (store.lanes >> t.lane() & 1));
}

// Memory that this thread is about to touch gets the stores there that the thread knows.
void land_known_at(const Thread& thread, const void* p) {
  Block& block = *thread.block;
  if (block.delayed_at[granule(p) % block.delayed_at.size()] == 0) return;
  for (size_t i = block.delayed.size(); i-- > 0;) {
    const DelayedStore& store = block.delayed[i];
    if (granule(store.to) == granule(p) && knows(thread, store)) land(block, i);
  }
}

void delay(const Thread& thread, void* p, const void* value, unsigned bytes, uint64_t due = 0) {
  Block& block = *thread.block;
  if (block.delayed.size() >= kMostDelayed) land(block, machine->random.below(block.delayed.size()));
  DelayedStore store{static_cast<std::byte*>(p), {}, bytes, thread.warp(), 1u << thread.lane(), false, due};
  std::memcpy(store.value, value, bytes);
  block.delayed.push_back(store);
  ++block.delayed_at[granule(p) % block.delayed_at.size()];
  ++machine->delayed;
  machine->delayed_to_host += due > 0;
}

// -- host memory that kernels see
// -----------------------------------------------------------------------------------

size_t offset_in(const std::byte* view, const void* p) {
  return static_cast<size_t>(static_cast<const std::byte*>(p) - view);
}

Mapping* mapping_of(std::byte* Mapping::* view, const void* p) {
  for (const auto& m : machine->mappings) {
    const auto at = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>((*m).*view);
    if (at >= begin && at - begin < m->bytes) return m.get();
  }
  return nullptr;
}

// Words are written whole: a thread of the host may be reading.
void copy_to_host(std::byte* to, const void* from, size_t bytes) {
  uint64_t word;
  if (bytes != sizeof(word)) {
    std::memcpy(to, from, bytes);
  } else {
    std::memcpy(&word, from, sizeof(word));
    __atomic_store_n(reinterpret_cast<uint64_t*>(to), word, __ATOMIC_RELEASE);
  }
}

// Copies what has just been written at p, in either view, to the other.
void mirror(const std::byte* p, const void* value, unsigned bytes) {
  Mapping* m = mapping_of(&Mapping::device, p);
  if (m) {
    const size_t at = offset_in(m->device, p);
    std::memcpy(&m->device_was[at], value, bytes);
    std::memcpy(&m->host_was[at], value, bytes);
    copy_to_host(m->host + at, value, bytes);
  } else if ((m = mapping_of(&Mapping::host, p))) {
    std::memcpy(&m->host_was[offset_in(m->host, p)], value, bytes);
  }
}

// Brings what the host has since written into the word at p to the device's view.
void fetch(const void* p) {
  Mapping* m = mapping_of(&Mapping::device, p);
  if (!m) return;
  const size_t at = offset_in(m->device, p) / sizeof(uint64_t) * sizeof(uint64_t);
  if (m->bytes - at < sizeof(uint64_t)) return;
  const uint64_t word = __atomic_load_n(reinterpret_cast<const uint64_t*>(m->host + at), __ATOMIC_ACQUIRE);
  if (std::memcmp(&m->host_was[at], &word, sizeof(word)) == 0) return;
  for (std::byte* view : {m->device, m->device_was.data(), m->host_was.data()}) {
    std::memcpy(view + at, &word, sizeof(word));
  }
  ++machine->changes;
}

void write(std::byte* p, const void* value, unsigned bytes) {
  if (std::memcmp(p, value, bytes) == 0) return;  // no polling thread could wait for it
  copy_to_host(p, value, bytes);
  ++machine->changes;
  if (!machine->mappings.empty()) mirror(p, value, bytes);
}
void write(uint64_t* p, uint64_t value) { write(reinterpret_cast<std::byte*>(p), &value, sizeof(value)); }

// -- accesses
// ---------------------------------------------------------------------------------------------------

void check_global(const void* p, size_t bytes, const char* what) {
  check_aligned(p, bytes, what);
  if (self->block->has_shared(p, bytes))
    machine->fail(std::string(what) + ": " + hex(p) + " is shared memory");
}

void begin_access(const void* p, size_t bytes, const char* what, bool anywhere = false) {
  machine->preempt();
  anywhere ? check_aligned(p, bytes, what) : check_global(p, bytes, what);
  if (!machine->config.delay_stores) return;
  land_known_at(*self, p);
  if (!machine->mappings.empty()) fetch(p);
}

void store(void* p, const void* value, unsigned bytes, const char* what) {
  begin_access(p, bytes, what);
  if (!machine->config.delay_stores) return write(static_cast<std::byte*>(p), value, bytes);
  // Reports an address out of bounds now, with the storing thread's stack.
  std::byte now[16];
  std::memcpy(now, p, bytes);
  delay(*self, p, value, bytes);
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
  machine->delayed_to_host -= store.due > 0;
  store = block.delayed.back();
  block.delayed.pop_back();
  --machine->delayed;
}

void land_known_to(const Thread& thread) {
  notice_mapped_stores(thread);
  Block& block = *thread.block;
  for (size_t i = block.delayed.size(); i-- > 0;) {
    if (knows(thread, block.delayed[i])) land(block, i);
  }
}

void share_with_lanes(Block& block, unsigned warp, uint32_t lanes) {
  notice_mapped_stores(*self);
  for (DelayedStore& store : block.delayed) {
    if (store.warp == warp && (store.lanes & lanes)) store.lanes |= lanes;
  }
}

void share_with_block(Block& block) {
  notice_mapped_stores(*self);
  for (DelayedStore& store : block.delayed) store.block_knows = true;
}

// The ordinary stores of a thread that has just run.
void notice_mapped_stores(const Thread& thread) {
  Mapping* m = thread.block->kernel->mapping;
  if (!m || std::memcmp(m->device, m->device_was.data(), m->bytes) == 0) return;
  const auto differs = [m](size_t i) { return m->device[i] != m->device_was[i]; };
  for (size_t i = 0; i < m->bytes; ++i) {
    if (!differs(i)) continue;
    const size_t begin = i;
    while (i + 1 < m->bytes && (i + 1) % sizeof(uint64_t) != 0 && differs(i + 1)) ++i;
    land_known_at(thread, m->host + begin);
    delay(thread, m->host + begin, m->device + begin, static_cast<unsigned>(i + 1 - begin),
          real_time() + machine->random.below(kMostNsToHost));
  }
  std::copy(m->device, m->device + m->bytes, m->device_was.begin());
}

// -- words
// ------------------------------------------------------------------------------------------------------

uint64_t load_acquire(const uint64_t* word) {
  begin_access(word, sizeof(*word), "load_acquire");
  if (machine->races) {
    machine->races->access(*self, word, sizeof(*word), Races::atomic_read, __builtin_return_address(0));
    machine->races->acquire(*self, word);
  }
  const uint64_t v = *word;
  machine->look(word, v);
  return v;
}

void store_release(uint64_t* word, uint64_t v) {
  begin_access(word, sizeof(*word), "store_release");
  land_known_to(*self);
  if (machine->races) {
    machine->races->access(*self, word, sizeof(*word), Races::atomic_write, __builtin_return_address(0));
    machine->races->release(*self, word, false);
  }
  write(word, v);
}

uint64_t add_release(uint64_t* word, uint64_t v) {
  begin_access(word, sizeof(*word), "add_release");
  land_known_to(*self);
  if (machine->races) {
    machine->races->access(*self, word, sizeof(*word), Races::atomic_write, __builtin_return_address(0));
    machine->races->release(*self, word, true);
  }
  const uint64_t old = *word;
  write(word, old + v);
  return old;
}

uint64_t add_acquire_release(uint64_t* word, uint64_t v) {
  const uint64_t old = add_release(word, v);
  if (machine->races) machine->races->acquire(*self, word);
  return old;
}

uint64_t exchange_if(uint64_t* word, uint64_t expected, uint64_t desired) {
  begin_access(word, sizeof(*word), "exchange_if");
  land_known_to(*self);
  const uint64_t old = *word;
  if (machine->races) {
    machine->races->access(*self, word, sizeof(*word), Races::atomic_write, __builtin_return_address(0));
    machine->races->acquire(*self, word);
    if (old == expected) machine->races->release(*self, word, true);
  }
  if (old == expected) {
    write(word, desired);
  } else {
    machine->look(word, old);  // a loop around it polls
  }
  return old;
}

void add_relaxed(uint32_t* word, uint32_t v) {
  begin_access(word, sizeof(*word), "add_relaxed", true);
  if (machine->races)
    machine->races->access(*self, word, sizeof(*word), Races::atomic_write, __builtin_return_address(0));
  const uint32_t sum = *word + v;
  write(reinterpret_cast<std::byte*>(word), &sum, sizeof(sum));
}

uint64_t load_relaxed(const uint64_t* word) {
  begin_access(word, sizeof(*word), "load_relaxed");
  if (machine->races)
    machine->races->access(*self, word, sizeof(*word), Races::atomic_read, __builtin_return_address(0));
  const uint64_t v = *word;
  machine->look(word, v);
  return v;
}

void store_relaxed(uint64_t* word, uint64_t v) {
  store(word, &v, sizeof(v), "store_relaxed");
  if (machine->races)
    machine->races->access(*self, word, sizeof(*word), Races::atomic_write, __builtin_return_address(0));
}

// -- 16-byte accesses
// -------------------------------------------------------------------------------------------

void load_global_16(void* to, const void* p) {
  begin_access(p, 16, "load_global");
  if (machine->races) machine->races->access(*self, p, 16, Races::read, __builtin_return_address(0));
  std::memcpy(to, p, 16);
}

void store_global_16(void* p, const void* from) {
  store(p, from, 16, "store_global");
  if (machine->races) machine->races->access(*self, p, 16, Races::write, __builtin_return_address(0));
}

void load_shared_16(void* to, const void* p) {
  machine->preempt();
  check_aligned(p, 16, "load_shared");
  if (!self->block->has_shared(p, 16)) machine->fail("load_shared: " + hex(p) + " is not in shared memory");
  if (machine->races) machine->races->access(*self, p, 16, Races::read, __builtin_return_address(0));
  std::memcpy(to, p, 16);
}

std::byte* dynamic_shared() { return self->block->shared; }

// -- time
// -------------------------------------------------------------------------------------------------------

uint64_t globaltimer() {
  machine->preempt();
  return machine->read_time();
}

void nanosleep(uint32_t ns) { machine->sleep(ns); }

}  // namespace simt
