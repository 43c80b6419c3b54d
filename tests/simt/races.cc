#include "simt/races.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <sstream>

#include "simt/machine.h"

extern "C" const char __executable_start;  // the linker's

namespace simt {
namespace {

constexpr uint32_t kBlockThreads = 1024;

uint32_t actor_of(const Thread& thread, Actor actor) {
  return thread.clock.number * kActors + static_cast<uint32_t>(actor);
}

// Return addresses are kept as offsets from the program's start.
uint32_t offset_of(const void* code) {
  return static_cast<uint32_t>(static_cast<const char*>(code) - &__executable_start);
}

// Function and line of the call that returns there, by addr2line where there is one.
std::string expanded_row_of(uint32_t code) {
  std::ostringstream command, text;
  command << "addr2line -Cfse /proc/" << getpid() << "/exe 0x" << std::hex << code - 1 << " 2>/dev/null";
  text << "0x" << std::hex << code - 1;
  FILE* output = popen(command.str().c_str(), "r");
  char line[256];
  for (int i = 0; output && i < 2 && fgets(line, sizeof(line), output); ++i) {
    line[strcspn(line, "\n")] = 0;
    text << " " << line;
  }
  if (output) pclose(output);
  return text.str();
}

}  // namespace

// -- knowledge
// ---------------------------------------------------------------------------------------------------

uint32_t Knowledge::of(uint32_t actor) const {
  const uint32_t warp = actor / kWarpActors, block = warp / kBlockWarps;
  if (!all_ || block >= (*all_).size() || !(*all_)[block]) return 0;
  const Ref<Warp>& steps = (*(*all_)[block])[warp % kBlockWarps];
  return steps ? (*steps)[actor % kWarpActors] : 0;
}

Knowledge::Warp& Knowledge::of_warp(uint32_t warp) {
  All& all = all_.own();
  const uint32_t block = warp / kBlockWarps;
  if (block >= all.size()) all.resize(block + 1);
  return all[block].own()[warp % kBlockWarps].own();
}

void Knowledge::set_own(uint32_t thread, const std::array<uint32_t, kActors>& steps) {
  const uint32_t first = thread * kActors;
  Warp& warp = of_warp(first / kWarpActors);
  for (uint32_t i = 0; i < kActors; ++i) {
    uint32_t& step = warp[first % kWarpActors + i];
    step = std::max(step, steps[i]);
  }
}

void Knowledge::set(uint32_t actor, uint32_t step) {
  if (of(actor) != step) of_warp(actor / kWarpActors)[actor % kWarpActors] = step;
}

void Knowledge::add(Ref<Warp>& mine, const Ref<Warp>& theirs) {
  if (!theirs || mine == theirs) return;
  if (!mine) {
    mine = theirs;
    return;
  }
  const Warp &a = *mine, &b = *theirs;
  uint32_t mine_is_less = 0, theirs_is_less = 0;
  for (size_t i = 0; i < kWarpActors; ++i) {
    mine_is_less |= a[i] < b[i];
    theirs_is_less |= b[i] < a[i];
  }
  if (!mine_is_less) return;
  if (!theirs_is_less) {
    mine = theirs;
    return;
  }
  Warp& most = mine.own();
  for (size_t i = 0; i < kWarpActors; ++i) most[i] = std::max(most[i], (*theirs)[i]);
}

void Knowledge::add(Ref<Block>& mine, const Ref<Block>& theirs) {
  if (!theirs || mine == theirs) return;
  if (!mine) {
    mine = theirs;
    return;
  }
  bool changed = false, as_theirs = true;
  Block sum = *mine;
  for (size_t w = 0; w < kBlockWarps; ++w) {
    add(sum[w], (*theirs)[w]);
    changed |= !(sum[w] == (*mine)[w]);
    as_theirs &= sum[w] == (*theirs)[w];
  }
  if (as_theirs) {
    mine = theirs;
  } else if (changed) {
    mine = Ref<Block>(sum);
  }
}

void Knowledge::add(const Knowledge& other) {
  if (!other.all_ || all_ == other.all_) return;
  if (!all_) {
    all_ = other.all_;
    return;
  }
  const All& theirs = *other.all_;
  All sum = *all_;
  if (sum.size() < theirs.size()) sum.resize(theirs.size());
  bool changed = false, as_theirs = sum.size() == theirs.size();
  for (size_t b = 0; b < theirs.size(); ++b) {
    add(sum[b], theirs[b]);
    changed |= b >= (*all_).size() || !(sum[b] == (*all_)[b]);
    as_theirs = as_theirs && sum[b] == theirs[b];
  }
  if (as_theirs) {
    all_ = other.all_;
  } else if (changed) {
    all_ = Ref<All>(sum);
  }
}

// -- which thread knows what
// ----------------------------------------------------------------------------------------------

uint32_t Races::block_number(const Block& block) {
  const auto [it, is_new] =
      blocks_.insert({{block.kernel->stream, block.index}, static_cast<uint32_t>(blocks_.size())});
  if (is_new) names_.push_back(name_of(block));
  return it->second;
}

// All that ended before a block starts is ordered before it: the host may have waited for it. Threads go on
// where those of the same index in the stream's last kernel ended.
void Races::start(Block& block) {
  forget(block.shared, block.kernel->shared_bytes);
  const uint32_t first = block_number(block) * kBlockThreads;
  for (Thread& thread : block.threads) {
    Clock& c = thread.clock;
    c.number = first + thread.index;
    c.own = steps_[c.number];
    c.loads = c.own[static_cast<size_t>(Actor::load)];
    c.store_steps = c.own[static_cast<size_t>(Actor::store_read)];
    c.own_fenced = c.own;
    ++c.own[0];
    c.known = c.fenced = ended_;
  }
}

// All its copies are over, or an error is reported.
void Races::end(Thread& thread) {
  Clock& c = thread.clock;
  const auto groups = static_cast<uint32_t>(thread.first_group + thread.groups.size());
  c.own = {c.own[0], c.loads, c.store_steps + groups, c.store_steps + groups};
  steps_[c.number] = c.own;
  Knowledge& of_all = thread.block->kernel->known;
  of_all.add(c.known);
  of_all.set_own(c.number, c.own);
  c.known = {};
  c.fenced = {};
}

void Races::end(const Kernel& kernel) { ended_.add(kernel.known); }

// All lanes now know what each has done, and go on to their next steps.
void Races::renew(Block& block, unsigned warp, uint32_t lanes, Knowledge& known, Knowledge& fenced) {
  Thread* threads = &block.threads[warp * kLanes];
  for (uint32_t left = lanes; left; left &= left - 1) {
    const Clock& c = threads[__builtin_ctz(left)].clock;
    known.add(c.known);
    fenced.add(c.fenced);
  }
  for (uint32_t left = lanes; left; left &= left - 1) {
    Clock& c = threads[__builtin_ctz(left)].clock;
    known.set_own(c.number, c.own);
    fenced.set_own(c.number, c.own_fenced);
    ++c.own[0];
  }
}

void Races::meet(Block& block, unsigned warp, uint32_t lanes) {
  Knowledge known, fenced;
  renew(block, warp, lanes, known, fenced);
  for (; lanes; lanes &= lanes - 1) {
    Thread& t = block.threads[warp * kLanes + static_cast<unsigned>(__builtin_ctz(lanes))];
    t.clock.known = known;
    t.clock.fenced = fenced;
  }
}

void Races::meet(Block& block) {
  Knowledge known, fenced;
  for (unsigned w = 0; w < block.warps.size(); ++w) renew(block, w, block.warps[w].lanes, known, fenced);
  for (Thread& t : block.threads) {
    t.clock.known = known;
    t.clock.fenced = fenced;
  }
}

void Races::acquire(Thread& thread, const Words& words, const void* word) {
  const auto it = words.find(word);
  if (it == words.end()) return;
  const Word& w = it->second;
  Clock& c = thread.clock;
  if (c.polled == word && c.version == w.version) return;
  c.polled = word;
  c.version = w.version;
  Acquired& last = last_acquired_;
  if (last.version != w.version || !(last.known == c.known) || !(last.fenced == c.fenced)) {
    last = {w.version, c.known, c.fenced, c.known, c.fenced};
    last.new_known.add(w.known);
    last.new_fenced.add(w.fenced);
  }
  c.known = last.new_known;
  c.fenced = last.new_fenced;
}

void Races::release(Thread& thread, Words& words, const void* word, bool adds) {
  Clock& c = thread.clock;
  Word& w = words[word];
  if (!adds) w = {};
  w.version = ++versions_;
  w.known.add(c.known);
  w.known.set_own(c.number, c.own);
  w.fenced.add(c.fenced);
  w.fenced.set_own(c.number, c.own_fenced);
  ++c.own[0];
}

void Races::acquire(Thread& thread, const void* word) { acquire(thread, words_, word); }
void Races::release(Thread& thread, const void* word, bool adds) { release(thread, words_, word, adds); }
void Races::acquire_barrier(Thread& thread, const void* mbarrier) {
  acquire(thread, thread.block->barriers, mbarrier);
}
void Races::release_barrier(Thread& thread, const void* mbarrier) {
  release(thread, thread.block->barriers, mbarrier, true);
}

void Races::fence(Thread& thread) {
  Clock& c = thread.clock;
  c.fenced = c.known;
  c.own_fenced = c.own;
  ++c.own[0];
}

// -- accesses
// -------------------------------------------------------------------------------------------

Races::Byte& Races::byte_at(uintptr_t address) {
  const uintptr_t page = address / kPage;
  if (page != last_page_ || !last_) {
    auto& found = pages_[page];
    if (!found) found = std::make_unique<Page>();
    last_ = found.get();
    last_page_ = page;
  }
  return (*last_)[address % kPage];
}

void Races::forget(const void* p, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (uintptr_t at = begin; at < end;) {
    const auto page = pages_.find(at / kPage);
    const uintptr_t next = std::min(end, (at / kPage + 1) * kPage);
    if (page != pages_.end()) std::fill_n(&(*page->second)[at % kPage], next - at, Byte{});
    at = next;
  }
}

// Whether the thread knows that an access is over. For the copy engine a write must not only be known, but
// known at the last fence; it knows what it has itself brought to shared memory.
bool Races::knows(const Thread& thread, const Access& access, bool by_engine) {
  const Clock& c = thread.clock;
  const uint32_t actor = access.actor % kActors;
  const bool needs_fence =
      by_engine && access.kind % 2 == write && actor != static_cast<uint32_t>(Actor::load);
  if (access.actor / kActors == c.number) {
    if (actor == 0 && !needs_fence) return true;
    if ((needs_fence ? c.own_fenced : c.own)[actor] >= access.step) return true;
  }
  return (needs_fence ? c.fenced : c.known).of(access.actor) >= access.step;
}

void Races::access_as(Thread& thread, Actor actor, uint32_t step, const void* p, size_t bytes, Kind kind,
                      const void* code) {
  const bool by_engine = actor != Actor::thread;
  const Access mine{step, offset_of(code), actor_of(thread, actor), kind};
  const auto conflicts = [&](const Access& other) {
    if (other.step == 0 || (other.kind >= atomic_read && kind >= atomic_read)) return false;
    return !knows(thread, other, by_engine);
  };
  const auto check = [&](const Access& other, size_t at) {
    if (!conflicts(other) || machine->has_failed()) return;
    machine->report("race on " + hex(static_cast<const std::byte*>(p) + at) + ":\n    " + text_of(mine) +
                    ",\n    and nothing orders it after: " + text_of(other) + "\n   ");
  };
  const auto begin = reinterpret_cast<uintptr_t>(p);
  for (size_t i = 0; i < bytes; ++i) {
    Byte& b = byte_at(begin + i);
    check(b.written, i);
    if (kind % 2 == write) {
      for (Access& r : b.reads) {
        check(r, i);
        r = {};
      }
      b.written = mine;
    } else {
      // Replaces a read that is ordered before, or else either of the two.
      const auto goes = [&](const Access& r) {
        return r.step == 0 || r.actor == mine.actor || !conflicts(r);
      };
      b.reads[goes(b.reads[0]) ? 0 : goes(b.reads[1]) ? 1 : machine->random.below(2)] = mine;
    }
  }
}

void Races::access(Thread& thread, const void* p, size_t bytes, Kind kind, const void* code) {
  access_as(thread, Actor::thread, thread.clock.own[0], p, bytes, kind, code);
}

void Races::start_load(Thread& thread, Copy& copy, const void* code) {
  copy.number = ++thread.clock.loads;
  access_as(thread, Actor::load, copy.number, copy.from, copy.bytes, read, code);
  access_as(thread, Actor::load, copy.number, copy.to, copy.bytes, write, code);
}

// A thread that finds the phase ended knows the load.
void Races::end_load(const Copy& copy) {
  Word& barrier = copy.block->barriers[copy.barrier];
  barrier.version = ++versions_;
  barrier.known.set(actor_of(*copy.thread, Actor::load), copy.number);
}

void Races::start_store(Thread& thread, const Copy& copy, const void* code) {
  const uint32_t step = thread.clock.store_steps + static_cast<uint32_t>(copy.group) + 1;
  access_as(thread, Actor::store_read, step, copy.from, copy.bytes, read, code);
  access_as(thread, Actor::store_write, step, copy.to, copy.bytes, write, code);
}

void Races::know_stores(Thread& thread, uint64_t groups, bool written) {
  Clock& c = thread.clock;
  const uint32_t step = c.store_steps + static_cast<uint32_t>(groups);
  for (const Actor actor : {Actor::store_read, Actor::store_write}) {
    uint32_t& own = c.own[static_cast<size_t>(actor)];
    if (actor == Actor::store_read || written) own = std::max(own, step);
  }
}

// -- texts
// -------------------------------------------------------------------------------------------------------

std::string Races::text_of(const Access& access) const {
  constexpr const char* kinds[] = {"reads", "writes", "reads atomically", "writes atomically"};
  constexpr const char* actors[] = {"", "'s bulk load", "'s bulk store", "'s bulk store"};
  const uint32_t thread = access.actor / kActors;
  return names_[thread / kBlockThreads] + " thread " + std::to_string(thread % kBlockThreads) +
         actors[access.actor % kActors] + " " + kinds[access.kind] + " at " + expanded_row_of(access.code);
}

}  // namespace simt
