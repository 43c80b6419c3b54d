// The simulated machine: blocks, warps and threads, and the scheduler. Only the .cc files here use it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <string>
#include <vector>

#include "simt/device.h"
#include "simt/fiber.h"
#include "simt/races.h"
#include "simt/simt.h"

namespace simt {

// xorshift64*: one state for all decisions, so a seed repeats a run.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 | 1) {
    for (int i = 0; i < 4; ++i) next();
  }
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1d;
  }
  size_t below(size_t n) { return (next() >> 32) * n >> 32; }
  bool one_in(size_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

constexpr int kLanes = 32;

enum class State : uint8_t { ready, asleep, at_collective, at_barrier, exited };

struct Block;

// One group of a thread's bulk stores: how many have not yet read, and not yet written.
struct BulkGroup {
  int stores = 0;
  int unread = 0;
  int unwritten = 0;
  bool committed = false;
  bool awaited_read = false;  // the thread knows that they have read
};

struct Thread {
  Block* block = nullptr;
  unsigned index = 0;
  State state = State::ready;
  Fiber fiber;

  // The collective that the thread is at.
  Collective kind{};
  uint32_t mask = 0;
  int source = 0;
  uint64_t value = 0;
  uint64_t result = 0;

  unsigned barriers = 0;  // __syncthreads passed

  // Polling: the word that it last looked at, and how often since memory last changed.
  const void* polled = nullptr;
  uint64_t seen = 0;
  uint64_t change_seen = 0;
  int looks = 0;
  uint64_t change_at_nap = 0;
  int naps = 0;  // in a row without a change

  std::vector<BulkGroup> groups;    // oldest first; the last is open unless committed
  uint64_t first_group = 0;         // ordinal of groups[0]
  std::vector<uint64_t*> unfenced;  // mbarriers initialised since the last fence_mbarrier_init

  Clock clock;  // for Races

  unsigned warp() const { return index / kLanes; }
  unsigned lane() const { return index % kLanes; }
};

// Lanes that have arrived at one collective, and wait for the others of its mask.
struct Gathering {
  Collective kind;
  uint32_t mask;
  uint32_t arrived;
};

struct Warp {
  uint32_t lanes = 0;  // that exist: fewer than 32 in a last warp
  uint32_t exited = 0;
  uint32_t at_barrier = 0;
  std::vector<Gathering> gatherings;
};

// A store that has not landed yet, and the threads that know it: a release by one of them makes it land.
struct DelayedStore {
  std::byte* to;
  alignas(16) std::byte value[16];
  unsigned bytes;
  unsigned warp;     // of the storing thread
  uint32_t lanes;    // of that warp that know it: the thread's own, and those that __syncwarp told
  bool block_knows;  // __syncthreads told all
  uint64_t due;      // to the host: when it lands by itself, in real_time(), or earlier by a release; or 0
};

// Host memory that kernels see, in weak mode: the two sides have views of their own, so that a kernel's
// stores come to the host when a release says so, and not before by chance. See memory.cc.
struct Mapping {
  std::byte* host;
  std::byte* device;
  size_t bytes;
  std::vector<std::byte> host_was, device_was;  // when they were last compared
};

struct Kernel {
  int stream;
  unsigned grid, block;
  size_t shared_bytes;
  std::function<void()> body;
  Mapping* mapping;               // that it may write; or null
  std::vector<unsigned> waiting;  // blocks that have not started
  unsigned unfinished;            // blocks that have not ended, or whose stores have not all landed
  Knowledge known;                // of its threads that have ended
};

struct Block {
  Kernel* kernel;
  unsigned index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::byte* shared;  // exactly the kernel's shared_bytes, so that AddressSanitizer sees an overrun
  unsigned exited = 0;
  unsigned at_barrier = 0;
  bool votes_agree = true;  // of those that are there
  bool all_agreed = true;   // at the last barrier

  std::vector<DelayedStore> delayed;
  std::array<uint16_t, 512> delayed_at{};  // how many lie at addresses of this hash
  int copies = 0;                          // bulk copies under way
  Races::Words barriers;                   // what is known at mbarriers

  Block(Kernel* kernel, unsigned index, Random& random);
  ~Block();

  void free_shared();
  bool has_shared(const void* p, size_t bytes) const;
};

// A bulk copy under way.
struct Copy {
  enum Step : uint8_t { load, read, write } step;  // the next step; a store reads, and later writes
  Block* block;
  Thread* thread;
  std::byte* to;
  const std::byte* from;
  uint32_t bytes;
  uint64_t* barrier;                // of a load
  uint64_t group;                   // of a store: its ordinal
  uint32_t number;                  // of a load, for Races
  uint64_t due;                     // when the step comes, in virtual time
  std::vector<std::byte> captured;  // by a store, when it has read

  bool operator<(const Copy& other) const { return due > other.due; }
};

uint64_t real_time();  // in ns

// The host, as seen by a machine that runs while threads of the host use it (gpu.cc).
class Host {
 public:
  virtual ~Host() = default;
  // Hands over requests that have come since. Called often.
  virtual void take_in() = 0;
  // Lets real time pass until a request comes or `ns` have passed; UINT64_MAX: however long it takes. Returns
  // how long it took.
  virtual uint64_t wait(uint64_t ns) = 0;
  virtual void kernel_ended(int stream) = 0;
};

class Machine {
 public:
  // With a host, run() goes on until an error is reported, even when nothing is left to do; only the thread
  // that runs it may call the others; and where time leaps, real time passes.
  explicit Machine(const Config& config, Host* host = nullptr)
      : config(config), random(config.seed), host_(host) {
    choose_schedule();
    if (config.find_races) races = std::make_unique<Races>();
  }

  // `mapped`: host memory, as seen by kernels, that this one may write.
  void launch(int stream, unsigned grid, unsigned block, size_t shared_bytes, std::function<void()> body,
              const void* mapped = nullptr);
  Result run();
  uint64_t read_time();  // by kernels

  // Called by fibers.
  void preempt(int rarer = 1);              // lets others run, now and then
  void sleep(uint64_t ns);                  // lets others run; this thread only polls
  void look(const void* word, uint64_t v);  // perhaps a poll: sleeps if nothing has changed for long
  void block_current(State state);          // until make_ready

  struct Failed {};
  [[noreturn]] void fail(
      const std::string& what);  // reports it for this thread; throws Failed through the kernel

  void make_ready(Thread& thread);
  void schedule(Copy copy);               // its next step
  void report(const std::string& error);  // the first one counts
  bool has_failed() const { return !error_.empty(); }

  const Config config;
  Random random;
  uint64_t now = 0;            // virtual, in ns
  uint64_t changes = 0;        // of memory, exits and starts: a polling thread may wait for these
  size_t delayed_to_host = 0;  // stores, of all delayed ones
  size_t delayed = 0;          // stores, in all blocks
  std::vector<std::unique_ptr<Mapping>> mappings;
  std::unique_ptr<Races> races;  // null unless asked for
  std::vector<Copy> copies;      // a heap, the next one first

 private:
  struct Sleeper {
    uint64_t wake;
    Thread* thread;
    bool operator<(const Sleeper& other) const { return wake > other.wake; }
  };
  // Which threads are slow for a while. Gives the large skews that fair picks never reach.
  struct Schedule {
    int stream = -1, block = -1, warp = -1, thread = -1;  // stream -1: none is slow; others -1: all
    size_t steps = 1024;                                  // roughly how long it lasts
    int tries = 4;                                        // to find another thread
    int stops = 0;   // how often, without another, time passes for the host only
    size_t landing;  // 1 in this many steps lands a store

    bool is_slow(const Thread& t) const;
  };

  void step();
  bool can_start() const;
  void start_block();
  Thread* take_ready();
  void choose_schedule();
  void resume(Thread& thread);
  void wake_sleepers();
  void idle();
  void let_time_pass();
  void follow_clock();
  void wait_until(uint64_t next);
  void land_a_store();
  void advance_due_copies();
  void retire_if_done(Block& block);
  void end_thread(Thread& thread);
  void report_deadlock(const std::string& why);

  Host* const host_;
  std::map<int, std::deque<Kernel>> streams_;   // the first of each is running
  std::vector<std::unique_ptr<Block>> blocks_;  // resident, or ended with stores that have not landed
  int resident_ = 0;
  std::vector<Thread*> ready_;
  std::priority_queue<Sleeper> sleepers_;
  Schedule schedule_;
  uint64_t changes_when_idle_ = 0;
  int idle_rounds_ = 0;
  uint64_t switches_ = 0;
  uint64_t steps_ = 0;
  uint64_t looked_ = real_time();  // at the host's clock
  uint64_t ahead_ = 0;             // of it, by how much
  std::string error_;
};

extern Machine* machine;              // the running one
extern thread_local bool on_machine;  // whether this is the thread that runs it
extern Thread* self;                  // whose fiber runs; null in the scheduler

// report.cc
std::string name_of(const Block& block);
std::string name_of(const Thread& thread);  // "stream 0 block 1 thread 2"
std::string hex(const void* p);

// barriers.cc
std::string text_of(Collective kind, uint32_t mask);
void check_nobody_waits_for(const Thread& exited);

// memory.cc
void check_aligned(const void* p, size_t alignment, const char* what);
void land(Block& block, size_t i);
void share_with_lanes(Block& block, unsigned warp, uint32_t lanes);
void share_with_block(Block& block);
void land_known_to(const Thread& thread);
void notice_mapped_stores(const Thread& thread);

// bulk.cc
bool advance(Copy& copy);  // one step; whether another follows
void check_stores_awaited(const Thread& thread);
void check_loads_landed(const Block& block);

}  // namespace simt
