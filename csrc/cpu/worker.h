// The CPU worker: one thread of a rank's pool, in one operation. The protocol in protocol/ is written over
// these primitives; the CUDA worker has the same ones.
#pragma once

#include <atomic>
#include <cstring>
#include <mutex>
#include <utility>

#include "cpu/bell.h"
#include "cpu/failure.h"
#include "cpu/pool.h"
#include "cpu/vector_ops.h"
#include "heap/symmetric_heap.h"
#include "protocol/words.h"

namespace commlib {

// What the workers of one operation share.
struct OpContext {
  const PeerTable* peers;
  const VectorOps* ops;
  const PeerProcesses* processes;
  SpinPolicy spin;
  InterruptCheck interrupted;  // asked by worker 0; null where that is not the user's own thread
  Call call;
  uint32_t epoch;
  double timeout;

  // Set once by the first worker that gives up (release); the others see it at their next nap (acquire).
  std::atomic<bool> failed{false};
  std::mutex mutex;  // guards failure
  Failure failure;
};

inline uint64_t load_word(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

class CpuWorker {
 public:
  CpuWorker(OpContext& op, int index, int count) : op_(op), index_(index), count_(count) {}

  int index() const { return index_; }
  int count() const { return count_; }
  static constexpr int lane() { return 0; }
  static constexpr int lanes() { return 1; }
  // This worker's contiguous part of n items: [first, second).
  std::pair<int64_t, int64_t> share(int64_t n) const {
    return {n * index_ / count_, n * (index_ + 1) / count_};
  }

  void multicast(std::byte* const* dst, int n, const std::byte* src, int64_t bytes) {
    op_.ops->multicast(dst, n, src, bytes);
  }
  void reduce(DType t, std::byte* dst, const std::byte* const* src, const std::byte* const* weights, int n,
              int64_t elements) {
    op_.ops->reduce[static_cast<int>(t)](dst, src, weights, n, elements);
  }
  // One scalar of 4 or 8 bytes; null writes zero.
  static void copy_scalar(std::byte* dst, const std::byte* src, int64_t bytes) {
    if (!src) {
      std::memset(dst, 0, static_cast<size_t>(bytes));
    } else if (bytes == 4) {
      std::memcpy(dst, src, 4);
    } else {
      std::memcpy(dst, src, 8);
    }
  }

  // Orders this worker's streaming stores before its later releases.
  void flush() { op_.ops->flush(); }
  void publish(uint64_t* word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
  void add(uint64_t* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }
  uint64_t read(const uint64_t* word) { return load_word(word); }
  void wake(int peer) { ring(op_.peers->mail_to(peer).bell); }

  bool await_tag(const uint64_t* word, uint32_t tag, int peer, Phase phase) {
    return await([=] { return tag_of(load_word(word)) == tag; }, peer, phase);
  }
  bool await_reached(const uint64_t* word, uint32_t tag, int peer, Phase phase) {
    return await([=] { return reached(tag_of(load_word(word)), tag); }, peer, phase);
  }
  bool await_count(const uint64_t* counter, uint64_t count, int peer, Phase phase) {
    return await([=] { return load_word(counter) >= count; }, peer, phase);
  }

  // Records that `peer` made another call; always false.
  bool mismatch(int peer, Call theirs);

 private:
  template <class Ready>
  bool await(Ready ready, int peer, Phase phase) {
    if (ready()) return true;
    const double start = monotonic_seconds();
    return wait_on(op_.peers->mail_from(peer).bell, op_.spin, ready,
                   [&] { return gives_up(peer, phase, start); });
  }

  bool gives_up(int peer, Phase phase, double start);
  bool fail(Cause cause, int peer, Phase phase, double start, std::string detail);
  std::string last_words(int peer) const;
  bool has_called(int peer) const;
  bool someone_calls_otherwise();
  bool someone_left(int peer, Phase phase, double start);

  OpContext& op_;
  int index_;
  int count_;
};

}  // namespace commlib
