// The scheduler: which thread runs next, how time passes, when blocks start and end.
#include "simt/machine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "simt/cuda.h"

simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

Machine* machine = nullptr;
thread_local bool on_machine = false;
Thread* self = nullptr;

namespace {

constexpr size_t kMaxBlockThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block, on sm_90
constexpr std::align_val_t kSharedAlignment{128};

constexpr uint64_t kSwitchNs = 1;  // virtual time of one switch: thousands of threads share a microsecond
constexpr uint64_t kSpinNs = 20;   // sleep of a loop that polls without nanosleep
constexpr int kSpins = 32;         // a loop with this many looks at unchanged memory polls

void run_thread() {
  try {
    self->block->kernel->body();
  } catch (const Machine::Failed&) {  // reported already
  } catch (const std::exception& e) {
    machine->report(name_of(*self) + ": threw: " + e.what());
  }
  self->state = State::exited;
  self->fiber.finish();
}

}  // namespace

Simulation::Simulation(const Config& config) : machine_(std::make_unique<Machine>(config)) {}
Simulation::~Simulation() = default;

void Simulation::launch(int stream, unsigned grid, unsigned block, size_t shared_bytes,
                        std::function<void()> body) {
  machine_->launch(stream, grid, block, shared_bytes, std::move(body));
}

Result Simulation::run() { return machine_->run(); }

Block::Block(Kernel* kernel, unsigned index, Random& random)
    : kernel(kernel), index(index), threads(kernel->block), warps((kernel->block + kLanes - 1) / kLanes) {
  for (unsigned t = 0; t < threads.size(); ++t) {
    threads[t].block = this;
    threads[t].index = t;
    warps[threads[t].warp()].lanes |= 1u << threads[t].lane();
  }
  shared = static_cast<std::byte*>(::operator new(kernel->shared_bytes, kSharedAlignment));
  for (size_t i = 0; i < kernel->shared_bytes; i += sizeof(uint64_t)) {
    const uint64_t garbage = random.next();
    std::memcpy(shared + i, &garbage, std::min(sizeof(garbage), kernel->shared_bytes - i));
  }
}

Block::~Block() { free_shared(); }

void Block::free_shared() {
  ::operator delete(shared, kSharedAlignment);
  shared = nullptr;
}

bool Block::has_shared(const void* p, size_t bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(shared);
  const auto at = reinterpret_cast<uintptr_t>(p);
  return at >= begin && at - begin <= kernel->shared_bytes && kernel->shared_bytes - (at - begin) >= bytes;
}

void Machine::launch(int stream, unsigned grid, unsigned block, size_t shared_bytes,
                     std::function<void()> body, const void* mapped) {
  if (grid == 0 || block == 0 || block > kMaxBlockThreads || shared_bytes > kMaxSharedBytes) {
    throw std::invalid_argument("simt: no GPU launches " + std::to_string(grid) + " blocks of " +
                                std::to_string(block) + " threads with " + std::to_string(shared_bytes) +
                                " bytes of shared memory");
  }
  Mapping* mapping = nullptr;
  for (const auto& m : mappings) {
    if (m->device == mapped) mapping = m.get();
  }
  Kernel kernel{stream, grid, block, shared_bytes, std::move(body), mapping, {}, grid, {}};
  for (unsigned b = 0; b < grid; ++b) kernel.waiting.push_back(b);
  streams_[stream].push_back(std::move(kernel));
}

Result Machine::run() {
  constexpr uint64_t kStepsBetweenLooks = 64;
  Machine* outer = std::exchange(machine, this);
  on_machine = true;
  while (error_.empty()) {
    if (host_) host_->take_in();
    if (!config.time_leaps && ++steps_ % kStepsBetweenLooks == 0) follow_clock();
    if (!streams_.empty()) {
      step();
    } else if (!host_) {
      break;
    } else {
      host_->wait(UINT64_MAX);
    }
  }
  machine = outer;
  on_machine = machine != nullptr;
  return {error_, config.seed, switches_, now};
}

void Machine::step() {
  if (can_start() && (ready_.empty() || random.one_in(8))) start_block();
  if (random.one_in(schedule_.steps)) choose_schedule();
  if (delayed > 0 && random.one_in(schedule_.landing)) land_a_store();
  advance_due_copies();
  wake_sleepers();
  if (ready_.empty()) return idle();
  if (switches_ >= config.max_switches) return report_deadlock("no end after so many switches");
  if (Thread* thread = take_ready()) resume(*thread);
}

// -- threads
// ----------------------------------------------------------------------------------------------------

bool Machine::Schedule::is_slow(const Thread& t) const {
  if (stream != t.block->kernel->stream) return false;
  if (block >= 0 && static_cast<unsigned>(block) != t.block->index) return false;
  if (warp >= 0 && static_cast<unsigned>(warp) != t.warp()) return false;
  return thread < 0 || static_cast<unsigned>(thread) == t.index;
}

void Machine::choose_schedule() {
  constexpr size_t kLandings[] = {2, 8, 64};
  schedule_ = {};
  schedule_.landing = kLandings[random.below(3)];
  if (random.one_in(16)) {
    schedule_.steps = 8192;
    schedule_.tries = 32;
    schedule_.stops = host_ && random.one_in(4) ? 20 : 0;
  }
  if (ready_.empty()) return;
  const Thread& t = *ready_[random.below(ready_.size())];
  const size_t depth = random.below(5);
  if (depth > 0) schedule_.stream = t.block->kernel->stream;
  if (depth > 1) schedule_.block = static_cast<int>(t.block->index);
  if (depth > 2) schedule_.warp = static_cast<int>(t.warp());
  if (depth > 3) schedule_.thread = static_cast<int>(t.index);
}

// Null where the ready threads are to stand still, while time passes for the host.
Thread* Machine::take_ready() {
  constexpr uint64_t kStopNs = 50'000;
  size_t i = random.below(ready_.size());
  for (int tries = schedule_.tries; tries > 0 && schedule_.is_slow(*ready_[i]); --tries)
    i = random.below(ready_.size());
  if (schedule_.stops > 0 && schedule_.is_slow(*ready_[i])) {
    --schedule_.stops;
    now += host_->wait(kStopNs);
    return nullptr;
  }
  Thread* thread = ready_[i];
  ready_[i] = ready_.back();
  ready_.pop_back();
  return thread;
}

void Machine::resume(Thread& thread) {
  ++switches_;
  now += kSwitchNs;
  threadIdx.x = thread.index;
  blockIdx.x = thread.block->index;
  blockDim.x = thread.block->kernel->block;
  gridDim.x = thread.block->kernel->grid;
  self = &thread;
  thread.fiber.resume(config.stack_bytes, run_thread);
  self = nullptr;
  notice_mapped_stores(thread);
  if (thread.state == State::exited) end_thread(thread);
}

void Machine::make_ready(Thread& thread) {
  thread.state = State::ready;
  ready_.push_back(&thread);
}

void Machine::block_current(State state) {
  self->state = state;
  self->fiber.suspend();
}

void Machine::preempt(int rarer) {
  if (config.preempt <= 0 || !random.one_in(static_cast<size_t>(config.preempt) * rarer)) return;
  make_ready(*self);
  self->fiber.suspend();
}

// A thread that keeps finding nothing new sleeps longer and longer. Otherwise thousands of polling threads
// would take all switches, and never be asleep at the same time.
void Machine::sleep(uint64_t ns) {
  constexpr int kMostDoublings = 12;
  constexpr uint64_t kLongestNap = 60'000;  // by the host's clock: deadlines are looked at after many naps
  self->naps = self->change_at_nap == changes ? std::min(self->naps + 1, kMostDoublings) : 0;
  self->change_at_nap = changes;
  uint64_t nap = random.below(2 * ns + 1) << self->naps;
  if (!config.time_leaps) nap = std::min(nap, std::max(2 * ns, kLongestNap));
  sleepers_.push({now + 1 + nap, self});
  block_current(State::asleep);
}

void Machine::look(const void* word, uint64_t v) {
  self->polled = word;
  self->seen = v;
  if (self->change_seen != changes) {
    self->change_seen = changes;
    self->looks = 0;
  } else if (++self->looks > kSpins) {
    sleep(kSpinNs);
  }
}

uint64_t real_time() {
  const std::chrono::nanoseconds now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(now.count());
}

// -- time
// -------------------------------------------------------------------------------------------------------

void Machine::wake_sleepers() {
  while (!sleepers_.empty() && sleepers_.top().wake <= now) {
    make_ready(*sleepers_.top().thread);
    sleepers_.pop();
  }
}

// No thread can run now. Time passes faster than stores land, so that polling threads see some without
// others.
void Machine::idle() {
  if (streams_.empty() || can_start()) return;  // because a store or copy has just landed
  const bool events = !sleepers_.empty() || !copies.empty();
  if (delayed > 0 && (!events || random.one_in(schedule_.landing))) return land_a_store();
  if (!events) return report_deadlock("no thread can run");
  let_time_pass();
}

// Everything waits for time. While polls find nothing new, ever larger leaps come on top of what the sleepers
// asked for: a deadline of a minute expires after some 36 of them. With a host, which may be what they wait
// for, leaps take real time.
void Machine::let_time_pass() {
  constexpr int kLargestLeap = 40;
  constexpr int kFirstWait = 14, kLargestWait = 20;  // of 16 us and 1 ms
  const uint64_t wake = sleepers_.empty() ? UINT64_MAX : sleepers_.top().wake;
  const uint64_t next = std::max(now, copies.empty() ? wake : std::min(wake, copies.front().due));
  if (!config.time_leaps) return wait_until(next);
  if (delayed > delayed_to_host || !copies.empty() || changes != changes_when_idle_) {
    now = next;
    changes_when_idle_ = changes;
    idle_rounds_ = 0;
    return;
  }
  idle_rounds_ = std::min(idle_rounds_ + 1, host_ ? kLargestWait : kLargestLeap);
  const uint64_t leap = next - now + (uint64_t{1} << idle_rounds_);
  now += host_ && idle_rounds_ >= kFirstWait ? std::min(leap, host_->wait(leap)) : leap;
  if (!host_ && now > config.time_limit_ns) {
    report_deadlock("all threads wait or poll, and the time limit has passed");
  }
}

// Time passes as on the host's clock, but for what the machine's thread lost to others: so a deadline expires
// when it says, also on a busy host.
void Machine::follow_clock() {
  constexpr uint64_t kLongestTurn = 2'000'000;
  const uint64_t clock = real_time();
  const uint64_t passed = std::min(clock - looked_, kLongestTurn), owed = std::min(ahead_, passed);
  looked_ = clock;
  ahead_ -= owed;
  now += passed - owed;
}

// To sleep for microseconds would take longer, so time may be ahead by that much.
void Machine::wait_until(uint64_t next) {
  constexpr uint64_t kUnnoticed = 10'000, kLongestWait = 1'000'000;
  if (ahead_ + (next - now) > kUnnoticed) {
    host_->wait(std::min(next - now, kLongestWait));
    return follow_clock();
  }
  ahead_ += next - now;
  now = next;
}

// With a host, deadlines of waits are longer than any test; but checks why a wait does not end, made every
// few milliseconds, should come at all moments.
uint64_t Machine::read_time() {
  constexpr size_t kOneIn = 256, kMostNs = 10'000'000;
  if (host_ && config.time_leaps && random.one_in(kOneIn)) now += random.below(kMostNs);
  return ++now;
}

// Late, and some copies much later than others; the more threads can run, the longer each takes to notice.
void Machine::schedule(Copy copy) {
  const size_t most = size_t{1} << random.below(12);
  copy.due = now + 1 + random.below(most) * (1 + ready_.size() / 16);
  copies.push_back(std::move(copy));
  std::push_heap(copies.begin(), copies.end());
}

void Machine::advance_due_copies() {
  while (!copies.empty() && copies.front().due <= now) {
    std::pop_heap(copies.begin(), copies.end());
    Copy copy = std::move(copies.back());
    copies.pop_back();
    Block& block = *copy.block;
    if (advance(copy)) {
      schedule(std::move(copy));
    } else {
      --block.copies;
      retire_if_done(block);
    }
  }
}

void Machine::land_a_store() {
  size_t i = random.below(blocks_.size());
  while (blocks_[i]->delayed.empty()) i = (i + 1) % blocks_.size();
  Block& block = *blocks_[i];
  const size_t store = random.below(block.delayed.size());
  if (block.exited < block.threads.size() && block.delayed[store].due > real_time()) return;
  land(block, store);
  retire_if_done(block);
}

// -- blocks
// -----------------------------------------------------------------------------------------------------

bool Machine::can_start() const {
  if (resident_ >= config.sms) return false;
  return std::any_of(streams_.begin(), streams_.end(),
                     [](const auto& stream) { return !stream.second.front().waiting.empty(); });
}

void Machine::start_block() {
  std::vector<Kernel*> kernels;
  for (auto& stream : streams_) {
    if (!stream.second.front().waiting.empty()) kernels.push_back(&stream.second.front());
  }
  Kernel& kernel = *kernels[random.below(kernels.size())];
  unsigned& chosen = kernel.waiting[random.below(kernel.waiting.size())];
  const unsigned index = std::exchange(chosen, kernel.waiting.back());
  kernel.waiting.pop_back();
  blocks_.push_back(std::make_unique<Block>(&kernel, index, random));
  if (races) races->start(*blocks_.back());
  for (Thread& thread : blocks_.back()->threads) make_ready(thread);
  ++resident_;
  ++changes;
}

void Machine::end_thread(Thread& thread) {
  thread.fiber.release();
  if (races) races->end(thread);
  ++changes;
  Block& block = *thread.block;
  ++block.exited;
  block.warps[thread.warp()].exited |= 1u << thread.lane();
  check_nobody_waits_for(thread);
  check_stores_awaited(thread);
  if (block.exited < block.threads.size()) return;
  check_loads_landed(block);
  block.free_shared();
  --resident_;
  retire_if_done(block);
}

// An ended block stays until its last store has landed; the last block of a kernel lets the next one start.
void Machine::retire_if_done(Block& block) {
  if (block.exited < block.threads.size() || !block.delayed.empty() || block.copies > 0) return;
  Kernel& kernel = *block.kernel;
  const auto it = std::find_if(blocks_.begin(), blocks_.end(), [&](auto& b) { return b.get() == &block; });
  std::swap(*it, blocks_.back());
  blocks_.pop_back();
  if (--kernel.unfinished > 0) return;
  if (races) races->end(kernel);
  const int number = kernel.stream;
  const auto stream = streams_.find(number);
  stream->second.pop_front();
  if (stream->second.empty()) streams_.erase(stream);
  if (host_) host_->kernel_ended(number);
}

}  // namespace simt
