#include "cpu/worker.h"

namespace commlib {

// The first failure of an operation is the one that is told.
void CpuWorker::fail(FailureRecord record, double seconds) {
  if (record.cause == Cause::none) return;
  record.waited_ns = static_cast<uint64_t>(seconds * 1e9);
  std::lock_guard<std::mutex> lock(op_.mutex);
  if (op_.failed.load(std::memory_order_relaxed)) return;
  op_.record = record;
  op_.failed.store(true, std::memory_order_release);
}

bool CpuWorker::mismatch(int peer, Call theirs) {
  fail(mismatch_record(*this, *op_.peers, op_.wait, peer, theirs), 0);
  return false;
}

void CpuWorker::reject(int peer) {
  fail(new_record(*this, *op_.peers, op_.wait, Cause::damaged, peer, Phase::arrival), 0);
}

bool CpuWorker::may_begin() {
  if (!op_.gave_up->load(std::memory_order_acquire)) return true;
  fail(new_record(*this, *op_.peers, op_.wait, Cause::broken, op_.peers->rank, Phase::call), 0);
  return false;
}

bool CpuWorker::gives_up(int peer, Phase phase, double seconds, bool signalled, FailureRecord* record) {
  if (op_.failed.load(std::memory_order_acquire)) return true;
  if (op_.gave_up->load(std::memory_order_acquire)) {
    *record = new_record(*this, *op_.peers, op_.wait, Cause::broken, op_.peers->rank, phase);
    return true;
  }
  if (find_cause(*this, *op_.peers, op_.wait, peer, phase, record)) return true;
  Cause cause = Cause::none;
  int blamed = peer;
  if (op_.peers->is_near(peer) ? op_.processes->has_exited(peer) : find_exited(&blamed)) {
    cause = Cause::exited;
  } else if (op_.network && op_.network->has_lost(peer)) {
    cause = Cause::lost;
  } else if (index_ == 0 && op_.interrupted && op_.interrupted(signalled)) {
    cause = Cause::interrupted;
  } else if (seconds >= op_.timeout) {
    cause = Cause::timeout;
  }
  if (cause == Cause::none) return false;
  *record = new_record(*this, *op_.peers, op_.wait, cause, blamed, phase);
  return true;
}

// What comes from other nodes comes through ranks of this one.
bool CpuWorker::find_exited(int* rank) const {
  for (int p = 0; p < op_.peers->size; ++p) {
    if (!op_.peers->is_near(p) || !op_.processes->has_exited(p)) continue;
    *rank = p;
    return true;
  }
  return false;
}

}  // namespace commlib
