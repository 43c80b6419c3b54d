// Threads that wait for each other: warp collectives and __syncthreads, and their misuse.
#include <sstream>
#include <utility>

#include "simt/machine.h"

namespace simt {
namespace {

constexpr int kNoLane = -1;

int first_lane(uint32_t mask) { return mask ? __builtin_ctz(mask) : kNoLane; }

Thread& thread_at(Block& block, unsigned warp, unsigned lane) { return block.threads[warp * kLanes + lane]; }

template <class Action>
void for_lanes(Block& block, unsigned warp, uint32_t mask, const Action& action) {
  for (; mask; mask &= mask - 1) action(thread_at(block, warp, static_cast<unsigned>(first_lane(mask))));
}

[[noreturn]] void fail(Collective kind, uint32_t mask, int lane, const std::string& what) {
  machine->fail(text_of(kind, mask) + ": lane " + std::to_string(lane) + what);
}

// Reports what would make a GPU hang or misbehave: waiting for lanes that cannot come.
void check_can_meet(const Warp& warp, const Thread& me, Collective kind, uint32_t mask) {
  const uint32_t my_bit = 1u << me.lane();
  if (!(mask & my_bit)) fail(kind, mask, static_cast<int>(me.lane()), " is not in its own mask");
  if (mask & warp.exited) fail(kind, mask, first_lane(mask & warp.exited), " has exited");
  if (mask & warp.at_barrier) fail(kind, mask, first_lane(mask & warp.at_barrier), " waits at __syncthreads");
  for (const Gathering& other : warp.gatherings) {
    const bool same = other.kind == kind && other.mask == mask;
    if (same || !(other.mask & my_bit) || !(other.arrived & mask)) continue;
    fail(kind, mask, first_lane(other.arrived & mask), " waits at " + text_of(other.kind, other.mask));
  }
}

Gathering& gathering_of(Warp& warp, Collective kind, uint32_t mask) {
  for (Gathering& g : warp.gatherings) {
    if (g.kind == kind && g.mask == mask) return g;
  }
  warp.gatherings.push_back({kind, mask, 0});
  return warp.gatherings.back();
}

// The lanes of the mask whose value is `value`.
uint32_t lanes_with(Block& block, unsigned warp, uint32_t mask, uint64_t value) {
  uint32_t lanes = 0;
  for_lanes(block, warp, mask, [&](const Thread& t) { lanes |= (t.value == value ? 1u : 0u) << t.lane(); });
  return lanes;
}

void give_results(Block& block, unsigned warp, Collective kind, uint32_t mask) {
  const uint32_t ones = lanes_with(block, warp, mask, 1);
  for_lanes(block, warp, mask, [&](Thread& t) {
    switch (kind) {
      case Collective::syncwarp:
        t.result = 0;
        break;
      case Collective::shfl:
        t.result = thread_at(block, warp, static_cast<unsigned>(t.source)).value;
        break;
      case Collective::ballot:
        t.result = ones;
        break;
      case Collective::any:
        t.result = ones != 0;
        break;
      case Collective::all:
        t.result = ones == mask;
        break;
      case Collective::match:
        t.result = lanes_with(block, warp, mask, t.value);
        break;
    }
  });
}

}  // namespace

std::string text_of(Collective kind, uint32_t mask) {
  constexpr const char* names[] = {"__syncwarp", "__shfl_sync", "__ballot_sync",
                                   "__any_sync", "__all_sync",  "__match_any_sync"};
  std::ostringstream text;
  text << names[static_cast<int>(kind)] << "(0x" << std::hex << mask << ")";
  return text.str();
}

uint64_t collective(Collective kind, uint32_t mask, uint64_t value, int source) {
  machine->preempt();
  Thread& me = *self;
  Block& block = *me.block;
  Warp& warp = block.warps[me.warp()];
  mask &= warp.lanes;  // a full mask may name lanes that a short last warp lacks
  check_can_meet(warp, me, kind, mask);
  if (kind == Collective::shfl && !(mask >> source & 1)) {
    machine->fail(text_of(kind, mask) + ": reads lane " + std::to_string(source) +
                  ", which is not in the mask");
  }
  me.kind = kind;
  me.mask = mask;
  me.value = value;
  me.source = source;

  Gathering& gathering = gathering_of(warp, kind, mask);
  gathering.arrived |= 1u << me.lane();
  if (gathering.arrived != mask) {
    machine->block_current(State::at_collective);
    return me.result;
  }
  gathering = warp.gatherings.back();
  warp.gatherings.pop_back();
  give_results(block, me.warp(), kind, mask);
  // The only collective that orders memory.
  if (kind == Collective::syncwarp) share_with_lanes(block, me.warp(), mask);
  if (kind == Collective::syncwarp && machine->races) machine->races->meet(block, me.warp(), mask);
  for_lanes(block, me.warp(), mask & ~(1u << me.lane()), [](Thread& t) { machine->make_ready(t); });
  const uint64_t result = me.result;
  machine->preempt();
  return result;
}

bool sync_threads(bool vote) {
  machine->preempt();
  Thread& me = *self;
  Block& block = *me.block;
  Warp& warp = block.warps[me.warp()];
  if (block.exited > 0) {
    machine->fail("__syncthreads: " + std::to_string(block.exited) + " threads of the block have exited");
  }
  for (const Gathering& g : warp.gatherings) {
    if (!(g.mask >> me.lane() & 1)) continue;
    machine->fail("__syncthreads: lane " + std::to_string(first_lane(g.arrived)) + " waits at " +
                  text_of(g.kind, g.mask));
  }
  warp.at_barrier |= 1u << me.lane();
  block.votes_agree = block.votes_agree && vote;
  if (++block.at_barrier < block.threads.size()) {
    machine->block_current(State::at_barrier);
  } else {
    block.at_barrier = 0;
    block.all_agreed = std::exchange(block.votes_agree, true);
    for (Warp& w : block.warps) w.at_barrier = 0;
    share_with_block(block);
    if (machine->races) machine->races->meet(block);
    for (Thread& t : block.threads) {
      if (&t != &me) machine->make_ready(t);
    }
    machine->preempt();
  }
  ++me.barriers;
  return block.all_agreed;  // the next barrier needs this thread
}

void check_nobody_waits_for(const Thread& exited) {
  const Block& block = *exited.block;
  for (const Gathering& g : block.warps[exited.warp()].gatherings) {
    if (!(g.mask >> exited.lane() & 1)) continue;
    machine->report(name_of(exited) + ": exited while lane " + std::to_string(first_lane(g.arrived)) +
                    " waits for it at " + text_of(g.kind, g.mask));
  }
  if (block.at_barrier > 0) {
    machine->report(name_of(exited) + ": exited after " + std::to_string(exited.barriers) +
                    " __syncthreads while " + std::to_string(block.at_barrier) + " threads wait at another");
  }
}

}  // namespace simt
