#include "backend/slots.h"

#include <algorithm>
#include <functional>

#include "backend/failure.h"

namespace commlib {

SlotLease::~SlotLease() {
  if (!pool_->home_.is_here()) return;  // a forked child lets go of a copy: the slot is its parent's
  if (!streams_.empty()) pool_->note_uses(index_, streams_);
  std::lock_guard<std::mutex> lock(pool_->mutex_);
  pool_->states_[index_].busy = false;
  pool_->states_[index_].freed = ++pool_->ended_;
}

Slot SlotLease::slot() const { return pool_->slot(index_); }
const SlotLayout& SlotLease::layout() const { return pool_->layout(); }

void SlotLease::use() {
  if (lent_ && used_) {
    throw SlotError(
        "this combine_buffer has served a combine, and other ranks may still read it: ask for a new one "
        "with combine_buffer(handle)");
  }
  used_ = true;
}

void SlotLease::use_on(uintptr_t stream) {
  std::lock_guard<std::mutex> lock(pool_->mutex_);
  if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) streams_.push_back(stream);
}

SlotPool::SlotPool(std::shared_ptr<void> heap, std::byte* slots, SlotLayout layout, int count, Choice choice)
    : heap_(std::move(heap)), slots_(slots), layout_(layout), choice_(choice), states_(count) {}

std::shared_ptr<SlotLease> SlotPool::take() {
  std::lock_guard<std::mutex> lock(mutex_);
  State* taken = nullptr;
  for (State& s : states_) {
    if (s.busy || (taken && (choice_ == Choice::first || s.freed >= taken->freed))) continue;
    taken = &s;
  }
  if (!taken) return nullptr;
  auto lease = std::make_shared<SlotLease>(shared_from_this(), static_cast<int>(taken - states_.data()));
  taken->busy = true;
  taken->lease = lease;
  return lease;
}

std::shared_ptr<SlotLease> SlotPool::find(const std::byte* address) {
  if (!holds(address)) return nullptr;
  const auto index = static_cast<int>((address - slots_) / layout_.bytes());
  std::lock_guard<std::mutex> lock(mutex_);
  return states_[index].lease.lock();
}

bool SlotPool::holds(const std::byte* address) const {
  const std::byte* end = slots_ + static_cast<int64_t>(states_.size()) * layout_.bytes();
  return !std::less<>()(address, static_cast<const std::byte*>(slots_)) && std::less<>()(address, end);
}

int SlotPool::in_use() {
  std::lock_guard<std::mutex> lock(mutex_);
  int n = 0;
  for (const State& s : states_) n += s.busy;
  return n;
}

}  // namespace commlib
