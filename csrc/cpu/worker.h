// The CPU worker: one thread of a rank's pool, in one operation. protocol/worker.h explains its members.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "base/event_count.h"
#include "base/words.h"
#include "cpu/pool.h"
#include "cpu/throttle.h"
#include "cpu/vector_ops.h"
#include "heap/peer_processes.h"
#include "net/network.h"
#include "protocol/failure.h"
#include "protocol/sequence.h"
#include "protocol/worker.h"

namespace commlib {

// What the workers of one operation share.
struct OpContext {
  const PeerTable* peers;
  const VectorOps* ops;
  const PeerProcesses* processes;
  Network* network;  // null: all ranks share a node
  SpinPolicy spin;
  InterruptCheck interrupted;        // asked by worker 0; null where that is not the user's own thread
  const std::atomic<bool>* gave_up;  // this rank's communicator: no operation of it can succeed any more
  OpId id;
  double timeout;
  Throttle* throttle;
  Sequence* sequence;

  uint64_t counters[kCounters] = {};  // see protocol/arrival.h

  // 1 once worker 0 has prepared what the others begin with (release, read acquire), 2 where it failed. They
  // sleep on the event count.
  uint64_t prepared = 0;
  EventCount preparing;

  // Set once by the first worker that gives up (release); the others see it at their next nap (acquire).
  std::atomic<bool> failed{false};
  std::mutex mutex;  // guards record
  FailureRecord record{};
};

// Seconds waited, as counted by looks. The time between two looks counts up to a limit: beyond that, this
// process stood still (SIGSTOP, a debugger, a suspended machine), and its peers were not late.
class Waited {
 public:
  double look() {
    const double now = monotonic_seconds();
    seconds_ += std::min(now - last_, kMostBetweenLooks);
    last_ = now;
    return seconds_;
  }

 private:
  static constexpr double kMostBetweenLooks = 10 * kNapSeconds;
  double last_ = monotonic_seconds();
  double seconds_ = 0;
};

class CpuWorker {
 public:
  static constexpr bool kMetadataWithRows = false;
  static constexpr bool kInternode = true;
  static constexpr bool kPlansGroups = true;
  static constexpr bool kBoundsPlans = true;
  static constexpr bool kConverts = true;

  CpuWorker(OpContext& op, int index, int count) : op_(op), index_(index), count_(count) {}

  int index() const { return index_; }
  int count() const { return count_; }
  static constexpr int lane() { return 0; }
  static constexpr int lanes() { return 1; }
  Span share(int64_t n) const { return share_of(n, index_, count_); }

  template <class T, class F>
  List<T> list(int n, F f) {
    static_assert(sizeof(T) <= sizeof(Term) && alignof(T) <= alignof(Term));
    T* items = reinterpret_cast<T*>(list_);
    int kept = 0;
    for (int j = 0; j < n; ++j) {
      const T item = f(j);
      if (item) items[kept++] = item;
    }
    return {items, kept};
  }
  static constexpr bool all(bool ok) { return ok; }
  static constexpr uint64_t any_bits(uint64_t mask) { return mask; }
  static constexpr int64_t lowest(int64_t value) { return value; }
  static constexpr Prefix prefix(int64_t value) { return {0, value}; }
  static uint32_t take(bool mine, uint32_t* counter) { return mine ? (*counter)++ : 0; }
  static uint32_t take_each(int32_t key, uint32_t* counters) { return key < 0 ? 0 : counters[key]++; }

  void multicast(List<Target> to, const std::byte* src, int64_t bytes) {
    op_.ops->multicast(to.items, to.count, src, bytes);
  }
  void convert(List<ConvertedTarget> to, const Conversion& how, const std::byte* src);
  void reduce(DType t, std::byte* dst, List<Term> terms, int64_t elements) {
    op_.ops->reduce[static_cast<int>(t)](dst, terms.items, terms.count, elements, ahead_);
    ahead_.count = 0;
  }
  template <class F>
  void will_read(int n, F row) {
    for (int j = 0; j < n; ++j) {
      if (const std::byte* from = row(j)) ahead_.rows[ahead_.count++] = from;
    }
  }
  void weigh(DType t, std::byte* dst, const Term& row, const std::byte* y, int64_t elements, std::byte* dot) {
    op_.ops->weigh[static_cast<int>(t)](dst, row, y, elements, dot);
  }
  static void zero(std::byte* dst, int64_t bytes) { std::memset(dst, 0, static_cast<size_t>(bytes)); }
  // Orders this worker's streaming stores before its later releases.
  void flush() { op_.ops->flush(); }
  static constexpr bool meet(bool ok) { return ok; }  // a plan is one thread's work here
  int gather() {
    flush();
    return 1;
  }
  static constexpr bool spoken_for_failed() { return false; }
  Lent* lent() { return &lent_; }
  template <class Ask>
  bool once(Ask ask) {
    return ask();
  }

  // The same worker, as the only one of a part of the operation.
  CpuWorker alone() const { return CpuWorker(op_, 0, 1); }
  // What `prepare` returns, which worker 0 calls while the others wait for it.
  template <class Prepare>
  bool prepared(Prepare prepare) {
    if (index_ == 0) {
      const bool ok = prepare();
      store_word(&op_.prepared, ok ? 1 : 2);
      commlib::notify(op_.preparing);
      return ok;
    }
    const auto is_over = [&] { return load_word(&op_.prepared) != 0; };
    // Worker 0 waits for no longer than its deadline; only an error of its own keeps it from saying so.
    wait_on(op_.preparing, op_.spin, is_over,
            [&](bool) { return op_.failed.load(std::memory_order_acquire); });
    return load_word(&op_.prepared) == 1;
  }

  bool throttled() const { return op_.throttle->limited(); }
  void pass_throttle(int64_t bytes) { op_.throttle->pass(bytes); }

  void publish(uint64_t* word, uint64_t value) { store_word(word, value); }
  const OpId& id() const { return op_.id; }
  uint64_t last_pull() const { return op_.sequence->last_pull[op_.id.call.slot]; }
  void pulls_from_slot(const OpId& id) { op_.sequence->last_pull[id.call.slot] = id.epoch; }
  uint32_t counted() const { return op_.sequence->counted; }
  void has_counted(uint32_t number) { op_.sequence->counted = number; }
  static void ended(const OpId&) {}
  uint64_t* counter(int i) { return &op_.counters[i]; }
  static bool completes(uint64_t* counter, uint64_t n, uint64_t all) {
    if (__atomic_add_fetch(counter, n, __ATOMIC_ACQ_REL) != all) return false;
    __atomic_store_n(counter, 0, __ATOMIC_RELAXED);  // no worker counts here again before the next operation
    return true;
  }
  uint64_t read(const uint64_t* word) { return load_word(word); }
  static void store_relaxed(uint64_t* word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
  }
  static uint64_t load_relaxed(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
  static bool replace(uint64_t* word, uint64_t before, uint64_t after) {
    return __atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  }
  static void notify(Signals& signals) { commlib::notify(signals.event); }
  void post(const Outbox&, const Post& post) { op_.network->post(post); }
  static void add_relaxed(uint32_t* counter, int n) { *counter += static_cast<uint32_t>(n); }
  static void copy_scalar(std::byte* dst, const std::byte* src, int64_t bytes) {
    if (!src) {
      std::memset(dst, 0, static_cast<size_t>(bytes));
    } else if (bytes == 4) {
      std::memcpy(dst, src, 4);
    } else {
      std::memcpy(dst, src, 8);
    }
  }

  template <class Ready, class Late>
  bool await(Ready ready, int peer, Late late, Phase phase) {
    return await_on(op_.peers->signals_from(peer).event, ready, late, phase);
  }
  bool await_tag(const uint64_t* word, uint32_t tag, int peer, Phase phase) {
    return await([=] { return tag_of(load_word(word)) == tag; }, peer, [=] { return bit_of(peer); }, phase);
  }
  bool await_change(const Internode& internode, uint64_t seen, uint64_t ranks) {
    return await_on(
        *internode.event, [&] { return load_word(internode.progress) != seen; }, [=] { return ranks; },
        Phase::network);
  }
  bool mismatch(int peer);
  void malformed(int peer, Phase phase);
  // Whether the operation may begin: not if the one before it ended the communicator.
  bool may_begin();

 private:
  template <class Ready, class Late>
  bool await_on(EventCount& event, Ready ready, Late late, Phase phase) {
    if (ready()) return true;
    Waited waited;
    bool told = false;
    const bool ok = wait_on(event, op_.spin, ready, [&](bool signalled) {
      const uint64_t awaited = late();
      const double seconds = waited.look();
      FailureRecord record{};
      if (awaited == 0) return false;  // it has come meanwhile
      if (!gives_up(awaited, phase, seconds, signalled, &record)) {
        told |= announce_wait(*this, *op_.peers, op_.id, awaited, seconds >= op_.timeout / 2);
        return false;
      }
      if (!ready()) fail(record, seconds);  // a departed rank did its part before it said so
      return true;
    });
    if (told && ok) announce_wait(*this, *op_.peers, op_.id, 0, false);
    return ok;
  }

  // Whether a wait for some ranks is to be given up, and why; Cause::none: another worker knows.
  bool gives_up(uint64_t awaited, Phase phase, double seconds, bool signalled, FailureRecord* record);
  void fail(FailureRecord record, double seconds);
  uint64_t find_exited(uint64_t awaited);
  uint64_t find_lost(uint64_t awaited);

  OpContext& op_;
  int index_;
  int count_;
  Lent lent_;
  Ahead ahead_;
  std::vector<std::byte> converted_;  // a row, then its scales: empty until a row is converted
  alignas(Term) std::byte list_[(kMaxTopk + 1) * sizeof(Term)];
};

}  // namespace commlib
