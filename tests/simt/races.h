// Finds accesses of kernels that nothing orders, whether or not they went wrong in this run: happens-before
// by vector clocks, as ThreadSanitizer does it on CPUs. See README.md for what orders what.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace simt {

struct Block;
struct Copy;
struct Kernel;
struct Thread;

// What accesses: a thread itself, and the copy engine for it, whose three kinds of accesses end
// independently.
enum class Actor : uint8_t { thread, load, store_read, store_write };
constexpr uint32_t kActors = 4;

// Shared by all that refer to it, on one thread.
template <class T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(const T& value) : p_(new Counted{1, value}) {}
  Ref(const Ref& other) : p_(other.p_) {
    if (p_) ++p_->references;
  }
  Ref(Ref&& other) noexcept : p_(std::exchange(other.p_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(p_, other.p_);
    return *this;
  }
  ~Ref() {
    if (p_ && --p_->references == 0) delete p_;
  }
  explicit operator bool() const { return p_ != nullptr; }
  bool operator==(const Ref& other) const { return p_ == other.p_; }
  const T& operator*() const { return p_->value; }
  // For a change: a copy, unless nothing else refers to it.
  T& own() {
    if (!p_) {
      p_ = new Counted{1, T{}};
    } else if (p_->references > 1) {
      *this = Ref(p_->value);
    }
    return p_->value;
  }

 private:
  struct Counted {
    size_t references;
    T value;
  };
  Counted* p_ = nullptr;
};

// Steps known to have happened: for each actor of each thread, the number of its newest. A tree whose equal
// parts are shared: threads that meet know the same.
class Knowledge {
 public:
  static constexpr uint32_t kWarpActors = 32 * kActors, kBlockWarps = 32;

  bool operator==(const Knowledge& other) const { return all_ == other.all_; }  // the very same
  uint32_t of(uint32_t actor) const;
  void set(uint32_t actor, uint32_t step);
  // Sets the steps of a thread's actors, where they are newer.
  void set_own(uint32_t thread, const std::array<uint32_t, kActors>& steps);
  void add(const Knowledge& other);

 private:
  using Warp = std::array<uint32_t, kWarpActors>;
  using Block = std::array<Ref<Warp>, kBlockWarps>;
  using All = std::vector<Ref<Block>>;

  Warp& of_warp(uint32_t warp);
  // `mine` becomes what either knows.
  static void add(Ref<Warp>& mine, const Ref<Warp>& theirs);
  static void add(Ref<Block>& mine, const Ref<Block>& theirs);

  Ref<All> all_;
};

// What a thread knows of others, and separately, so that many threads can share that, of itself.
struct Clock {
  using Own = std::array<uint32_t, kActors>;

  uint32_t number = 0;           // of the thread
  uint32_t loads = 0;            // bulk loads so far
  uint32_t store_steps = 0;      // groups of stores in earlier kernels
  Knowledge known, fenced;       // by itself, and by the copy engine: as of the last fence
  Own own{}, own_fenced{};       // own[0], the thread's own step, grows when it releases what it has done
  const void* polled = nullptr;  // the word that it last acquired, and its version
  uint64_t version = 0;
};

class Races {
 public:
  struct Word {
    Knowledge known, fenced;
    uint64_t version = 0;  // of the two
  };
  using Words = std::unordered_map<const void*, Word>;

  // -- which thread knows what
  void start(Block& block);
  void end(Thread& thread);
  void end(const Kernel& kernel);
  void meet(Block& block, unsigned warp, uint32_t lanes);
  void meet(Block& block);
  void acquire(Thread& thread, const void* word);
  void release(Thread& thread, const void* word, bool adds);  // adds: to what others have released there
  void acquire_barrier(Thread& thread, const void* mbarrier);
  void release_barrier(Thread& thread, const void* mbarrier);
  void fence(Thread& thread);

  // -- accesses: these report what they find
  enum Kind : uint8_t { read = 0, write = 1, atomic_read = 2, atomic_write = 3 };
  void access(Thread& thread, const void* p, size_t bytes, Kind kind, const void* code);
  void start_load(Thread& thread, Copy& copy, const void* code);
  void end_load(const Copy& copy);
  void start_store(Thread& thread, const Copy& copy, const void* code);
  // The first `groups` groups have read, and if `written` written too.
  void know_stores(Thread& thread, uint64_t groups, bool written);

 private:
  struct Access {
    uint32_t step = 0;  // 0: none
    uint32_t code = 0;  // offset in the program
    uint32_t actor = 0;
    Kind kind = read;
  };
  struct Byte {
    Access written;
    Access reads[2];  // two of them
  };
  static constexpr size_t kPage = 256;
  using Page = std::array<Byte, kPage>;

  uint32_t block_number(const Block& block);
  static void renew(Block& block, unsigned warp, uint32_t lanes, Knowledge& known, Knowledge& fenced);
  void acquire(Thread& thread, const Words& words, const void* word);
  void release(Thread& thread, Words& words, const void* word, bool adds);

  Byte& byte_at(uintptr_t address);
  void forget(const void* p, size_t bytes);  // it is new memory
  static bool knows(const Thread& thread, const Access& access, bool by_engine);
  void access_as(Thread& thread, Actor actor, uint32_t step, const void* p, size_t bytes, Kind kind,
                 const void* code);
  std::string text_of(const Access& access) const;

  std::map<std::pair<int, unsigned>, uint32_t> blocks_;  // numbers of (stream, block)
  std::vector<std::string> names_;                       // of blocks, by number
  std::unordered_map<uint32_t, Clock::Own> steps_;       // of threads that have ended, by number
  Words words_;
  uint64_t versions_ = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_page_ = 0;
  Page* last_ = nullptr;
  Knowledge ended_;  // of all kernels that have ended

  // The last result of acquiring a version of a word with some knowledge: the same for many threads.
  struct Acquired {
    uint64_t version = 0;
    Knowledge known, fenced, new_known, new_fenced;
  };
  Acquired last_acquired_;
};

}  // namespace simt
