// Which slots of this rank's heap are held, and by what.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/home_process.h"
#include "protocol/slot.h"

namespace commlib {

class SlotPool;

// Holds one slot until it is destroyed: by the job that uses it, and by the zero-copy tensors that view it.
// Keeps the heap mapped meanwhile. May be destroyed on any thread.
class SlotLease {
 public:
  SlotLease(std::shared_ptr<SlotPool> pool, int index) : pool_(std::move(pool)), index_(index) {}
  ~SlotLease();
  SlotLease(const SlotLease&) = delete;
  SlotLease& operator=(const SlotLease&) = delete;

  int index() const { return index_; }
  Slot slot() const;
  const SlotLayout& layout() const;
  // A lent slot is written by the user and good for one combine: peers may still pull after it has returned.
  void lend() { lent_ = true; }
  bool lent() const { return lent_; }
  void use();
  // CUDA: work that `stream` has queued when the lease ends may still use the slot.
  void use_on(uintptr_t stream);

 private:
  std::shared_ptr<SlotPool> pool_;
  int index_;
  bool lent_ = false;
  bool used_ = false;
  std::vector<uintptr_t> streams_;  // guarded by the pool's mutex
};

class SlotPool : public std::enable_shared_from_this<SlotPool> {
 public:
  // Which free slot is taken. The first, so that no more are ever touched than are needed; or the one that
  // has been free longest, so that what is still queued from its last use is soonest done.
  enum class Choice { first, longest_free };

  // `heap` keeps the memory at `slots` mapped.
  SlotPool(std::shared_ptr<void> heap, std::byte* slots, SlotLayout layout, int count,
           Choice choice = Choice::first);

  // A free slot, or null. For an operation that is captured in a CUDA graph, `capture`, not 0, says in which:
  // the slot then belongs to that graph as long as anyone has its `reservation`, whether or not it is leased.
  // Operations of the same capture may take it in turns, because they run in the order of a stream; any other
  // may run while the graph does not, and hold it when the graph runs again.
  std::shared_ptr<SlotLease> take(uint64_t capture = 0);
  std::shared_ptr<void> reservation(int index);
  bool is_reserved(int index, uint64_t capture);
  // The lease of the slot in which `address` lies, or null.
  std::shared_ptr<SlotLease> find(const std::byte* address);
  // Whether `address` lies in any slot.
  bool holds(const std::byte* address) const;
  const SlotLayout& layout() const { return layout_; }
  Slot slot(int index) const { return Slot::at(layout_, slots_, index); }
  int in_use(uint64_t capture = 0);
  virtual ~SlotPool() = default;

 private:
  // A lease ends while these streams use its slot. Must not throw.
  virtual void note_uses(int, const std::vector<uintptr_t>&) {}

  friend class SlotLease;
  struct State {
    std::weak_ptr<SlotLease> lease;
    bool busy = false;
    std::weak_ptr<void> reservation;  // by a graph, while there is one
    uint64_t capture = 0;             // of that graph
    uint64_t freed = 0;               // when, in leases that have ended

    bool is_free(uint64_t for_capture) const {
      return !busy && (reservation.expired() || (for_capture != 0 && capture == for_capture));
    }
  };

  const HomeProcess home_;
  std::shared_ptr<void> heap_;
  std::byte* slots_;
  SlotLayout layout_;
  const Choice choice_;
  std::mutex mutex_;  // guards the members below it
  std::vector<State> states_;
  uint64_t ended_ = 0;  // leases
};

}  // namespace commlib
