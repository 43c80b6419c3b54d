#include "cpu/worker.h"

namespace commlib {

// The first failure of an operation is the one reported.
void CpuWorker::fail(FailureRecord record, double seconds) {
  if (record.cause == Cause::none) return;
  record.waited_ns = static_cast<uint64_t>(seconds * 1e9);
  std::lock_guard<std::mutex> lock(op_.mutex);
  if (op_.failed.load(std::memory_order_relaxed)) return;
  op_.record = record;
  op_.failed.store(true, std::memory_order_release);
}

bool CpuWorker::mismatch(int peer) {
  fail(mismatch_record(*this, *op_.peers, op_.id, peer), 0);
  return false;
}

void CpuWorker::malformed(int peer, Phase phase) {
  fail(malformed_record(*this, *op_.peers, op_.id, peer, phase), 0);
}

bool CpuWorker::may_begin() {
  if (!op_.gave_up->load(std::memory_order_acquire)) return true;
  const uint64_t me = bit_of(op_.peers->rank);
  fail(new_record(*this, *op_.peers, op_.id, Cause::broken, me, me, Phase::call), 0);
  return false;
}

bool CpuWorker::gives_up(uint64_t awaited, Phase phase, double seconds, bool signalled,
                         FailureRecord* record) {
  const uint64_t me = bit_of(op_.peers->rank);
  const auto because = [&](Cause cause, uint64_t blamed) {
    *record = new_record(*this, *op_.peers, op_.id, cause, awaited, blamed, phase);
    return true;
  };
  if (op_.failed.load(std::memory_order_acquire)) return true;
  if (op_.gave_up->load(std::memory_order_acquire)) return because(Cause::broken, me);
  if (find_cause(*this, *op_.peers, op_.id, awaited, phase, record)) return true;
  if (const uint64_t exited = find_exited(awaited)) return because(Cause::exited, exited);
  if (const uint64_t lost = find_lost(awaited)) return because(Cause::lost, lost);
  if (index_ == 0 && op_.interrupted && op_.interrupted(signalled)) return because(Cause::interrupted, me);
  if (seconds < op_.timeout) return false;
  *record = timeout_record(*this, *op_.peers, op_.id, awaited, phase);
  return true;
}

// Ranks are waited for one after the other, and the one that is awaited now may only be late. So this looks
// at all of this node: a process that ended before this call never makes it. One that had made the call may
// have done its part; but what comes from other nodes comes through ranks of this one, in their processes,
// until they have closed.
uint64_t CpuWorker::find_exited(uint64_t awaited) {
  const uint64_t near = op_.peers->near;
  uint64_t exited = 0;
  for (uint64_t left = near; left; left &= left - 1) {
    const int p = lowest_bit(left);
    if (!op_.processes->has_exited(p)) continue;
    uint64_t blamed = 0;
    const bool did_its_part =
        !has(awaited, p) && has_called(*this, *op_.peers, p, op_.id.tag()) &&
        ((awaited & ~near) == 0 || how_departed(*this, *op_.peers, p, &blamed) == kClosed);
    if (!did_its_part) exited |= bit_of(p);
  }
  return exited;
}

uint64_t CpuWorker::find_lost(uint64_t awaited) const {
  return op_.network ? op_.network->lost_ranks() & awaited : 0;
}

}  // namespace commlib
