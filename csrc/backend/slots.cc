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

std::shared_ptr<SlotLease> SlotPool::take(uint64_t capture) {
  std::lock_guard<std::mutex> lock(mutex_);
  State* taken = nullptr;
  const auto is_better = [&](const State& s) {
    if (!taken) return true;
    const bool reserved = !s.reservation.expired();
    if (reserved != !taken->reservation.expired()) return reserved;
    return choice_ == Choice::longest_free && s.freed < taken->freed;
  };
  for (State& s : states_) {
    if (s.is_free(capture) && is_better(s)) taken = &s;
  }
  if (!taken) return nullptr;
  auto lease = std::make_shared<SlotLease>(shared_from_this(), static_cast<int>(taken - states_.data()));
  taken->busy = true;
  taken->capture = capture;
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

std::shared_ptr<void> SlotPool::reservation(int index) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto reservation = states_[index].reservation.lock();
  if (!reservation) states_[index].reservation = reservation = std::make_shared<char>();
  return reservation;
}

bool SlotPool::is_reserved(int index, uint64_t capture) {
  std::lock_guard<std::mutex> lock(mutex_);
  return states_[index].capture == capture && !states_[index].reservation.expired();
}

int SlotPool::in_use(uint64_t capture) {
  std::lock_guard<std::mutex> lock(mutex_);
  int n = 0;
  for (const State& s : states_) n += !s.is_free(capture);
  return n;
}

}  // namespace commlib
