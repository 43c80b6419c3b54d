// mbarriers and the bulk copy engine: copies that happen at random later moments.
#include <algorithm>
#include <cstring>

#include "simt/machine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
inline void* __asan_region_is_poisoned(void*, size_t) { return nullptr; }
#endif

namespace simt {
namespace {

// -- mbarriers
// --------------------------------------------------------------------------------------------------

constexpr uint16_t kInitialised = 0x6d62;  // shared memory starts as garbage, which is no barrier
constexpr int32_t kMostBytes = (1 << 20) - 1;
constexpr uint64_t kPollNs = 50;  // mbarrier_try_wait sleeps about this long

// What an mbarrier's 64-bit word holds here.
struct Barrier {
  int32_t bytes;   // expected in this phase and yet to come; below 0 while copies are ahead of expect
  uint16_t valid;  // kInitialised
  uint8_t parity;  // of the current phase
  uint8_t flags;

  static constexpr uint8_t kArrived = 1;  // the one thread has arrived in this phase
  static constexpr uint8_t kFenced = 2;   // the copy engine knows of it
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

Barrier load(const uint64_t* word) {
  Barrier barrier;
  std::memcpy(&barrier, word, sizeof(barrier));
  return barrier;
}

void store(uint64_t* word, const Barrier& barrier) {
  std::memcpy(word, &barrier, sizeof(barrier));
  ++machine->changes;
}

void store_and_end_phase(uint64_t* word, Barrier barrier) {
  if ((barrier.flags & Barrier::kArrived) && barrier.bytes == 0) {
    barrier.parity ^= 1;
    barrier.flags &= static_cast<uint8_t>(~Barrier::kArrived);
  }
  store(word, barrier);
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  check_aligned(p, alignment, what);
  if (self->block->has_shared(p, bytes)) return;
  machine->fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at " + hex(p) +
                " are not in the block's shared memory");
}

Barrier load_checked(const uint64_t* word, const char* what) {
  machine->preempt();
  check_shared(word, sizeof(*word), alignof(uint64_t), what);
  const Barrier barrier = load(word);
  if (barrier.valid != kInitialised) machine->fail(std::string(what) + ": no mbarrier at " + hex(word));
  return barrier;
}

// -- copies
// -----------------------------------------------------------------------------------------------------

void check_copy(const void* global, const void* shared, uint32_t bytes, const char* what) {
  machine->preempt();
  check_shared(shared, bytes, 16, what);
  check_aligned(global, 16, what);
  if (bytes % 16 != 0)
    machine->fail(std::string(what) + ": " + std::to_string(bytes) + " bytes are not a multiple of 16");
  if (self->block->has_shared(global, bytes))
    machine->fail(std::string(what) + ": " + hex(global) + " is shared memory");
  if (const void* bad = __asan_region_is_poisoned(const_cast<void*>(global), bytes)) {
    machine->fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at " + hex(global) + ": " +
                  hex(bad) + " is not allocated");
  }
}

void add_copy(Copy copy) {
  copy.block = self->block;
  copy.thread = self;
  ++self->block->copies;
  machine->schedule(std::move(copy));
}

BulkGroup& open_group() {
  auto& groups = self->groups;
  if (groups.empty() || groups.back().committed) groups.emplace_back();
  return groups.back();
}

// Forgets groups that no longer matter to this thread.
void forget_done_groups() {
  auto& groups = self->groups;
  size_t done = 0;
  while (done < groups.size() && groups[done].awaited_read && groups[done].unwritten == 0) ++done;
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
  self->first_group += done;
}

// Waits until `left` is 0 in all committed groups but the `pending` newest.
void await_groups(size_t pending, int BulkGroup::* left) {
  machine->preempt();
  self->polled = nullptr;
  auto& groups = self->groups;
  size_t committed = groups.size();
  if (committed > 0 && !groups.back().committed) --committed;
  for (size_t i = 0; i + pending < committed; ++i) {
    while (groups[i].*left > 0) machine->sleep(kPollNs);
    groups[i].awaited_read = true;
  }
  if (machine->races && committed > pending) {
    machine->races->know_stores(*self, self->first_group + committed - pending,
                                left == &BulkGroup::unwritten);
  }
  forget_done_groups();
}

void finish_load(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  Barrier barrier = load(copy.barrier);
  if (barrier.valid != kInitialised) {
    machine->report(name_of(*copy.thread) + ": the mbarrier at " + hex(copy.barrier) +
                    " was overwritten while a bulk_load was under way");
    return;
  }
  barrier.bytes -= static_cast<int32_t>(copy.bytes);
  store_and_end_phase(copy.barrier, barrier);
  if (machine->races) machine->races->end_load(copy);
}

}  // namespace

bool advance(Copy& copy) {
  ++machine->changes;
  // Groups of a thread that has exited are not counted.
  BulkGroup* group = nullptr;
  if (copy.step != Copy::load && copy.thread->state != State::exited) {
    group = &copy.thread->groups[copy.group - copy.thread->first_group];
  }
  switch (copy.step) {
    case Copy::load:
      finish_load(copy);
      return false;
    case Copy::read:
      copy.captured.assign(copy.from, copy.from + copy.bytes);
      if (group) --group->unread;
      copy.step = Copy::write;
      return true;
    case Copy::write:
      std::copy(copy.captured.begin(), copy.captured.end(), copy.to);
      if (group) --group->unwritten;
      return false;
  }
  return false;
}

// Shared memory goes with the block: no copy may be under way that, for all its thread knows, has yet to read
// it.
void check_stores_awaited(const Thread& thread) {
  for (const BulkGroup& group : thread.groups) {
    if (group.awaited_read || group.stores == 0) continue;
    machine->report(name_of(thread) + ": block ended with copies under way: no wait for " +
                    std::to_string(group.stores) + (group.committed ? " committed" : " uncommitted") +
                    " bulk stores of this thread");
  }
}

void check_loads_landed(const Block& block) {
  for (const Copy& copy : machine->copies) {
    if (copy.block != &block || copy.step != Copy::load) continue;
    machine->report(name_of(*copy.thread) + ": block ended with copies under way: a bulk_load of " +
                    std::to_string(copy.bytes) + " bytes has not come");
  }
}

void mbarrier_init(uint64_t* barrier) {
  machine->preempt();
  check_shared(barrier, sizeof(*barrier), alignof(uint64_t), "mbarrier_init");
  store(barrier, {0, kInitialised, 0, 0});
  self->unfenced.push_back(barrier);
}

void fence_mbarrier_init() {
  for (uint64_t* word : self->unfenced) {
    Barrier barrier = load(word);
    barrier.flags |= Barrier::kFenced;
    store(word, barrier);
  }
  self->unfenced.clear();
}

void mbarrier_expect(uint64_t* word, uint32_t bytes) {
  Barrier barrier = load_checked(word, "mbarrier_expect");
  if (barrier.flags & Barrier::kArrived)
    machine->fail("mbarrier_expect: the second one in a phase of 1 arrival");
  if (bytes > kMostBytes) machine->fail("mbarrier_expect: " + std::to_string(bytes) + " bytes are too many");
  barrier.bytes += static_cast<int32_t>(bytes);
  barrier.flags |= Barrier::kArrived;
  if (machine->races) machine->races->release_barrier(*self, word);
  store_and_end_phase(word, barrier);
}

bool mbarrier_try_wait(uint64_t* word, uint32_t parity) {
  constexpr const char* what = "mbarrier_try_wait";
  if (parity > 1) machine->fail(std::string(what) + ": parity " + std::to_string(parity));
  if (load_checked(word, what).parity == parity) {
    self->polled = word;
    self->seen = parity;
    machine->sleep(kPollNs);
    if (load(word).parity == parity) return false;
  }
  if (machine->races) machine->races->acquire_barrier(*self, word);
  return true;
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  check_copy(global, shared, bytes, "bulk_load");
  if (!(load_checked(barrier, "bulk_load").flags & Barrier::kFenced)) {
    machine->fail("bulk_load: no fence_mbarrier_init since the mbarrier was initialised");
  }
  Copy copy{};
  copy.step = Copy::load;
  copy.to = static_cast<std::byte*>(shared);
  copy.from = static_cast<const std::byte*>(global);
  copy.bytes = bytes;
  copy.barrier = barrier;
  if (machine->races) machine->races->start_load(*self, copy, __builtin_return_address(0));
  add_copy(std::move(copy));
}

void bulk_store(void* global, const void* shared, uint32_t bytes) {
  check_copy(global, shared, bytes, "bulk_store");
  BulkGroup& group = open_group();
  ++group.stores;
  ++group.unread;
  ++group.unwritten;
  Copy copy{};
  copy.step = Copy::read;
  copy.to = static_cast<std::byte*>(global);
  copy.from = static_cast<const std::byte*>(shared);
  copy.bytes = bytes;
  copy.group = self->first_group + self->groups.size() - 1;
  if (machine->races) machine->races->start_store(*self, copy, __builtin_return_address(0));
  add_copy(std::move(copy));
}

void bulk_commit() { open_group().committed = true; }

void bulk_wait_read(size_t pending) { await_groups(pending, &BulkGroup::unread); }
void bulk_wait_written() { await_groups(0, &BulkGroup::unwritten); }

// The only proxy effect modelled: without the fence, a bulk copy may miss the thread's delayed stores.
void fence_proxy_async() {
  machine->preempt();
  land_known_to(*self);
  if (machine->races) machine->races->fence(*self);
}

}  // namespace simt
