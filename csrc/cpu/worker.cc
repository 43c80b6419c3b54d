#include "cpu/worker.h"

namespace commlib {

// The converted row stays in the first caches until it has gone to all targets.
void CpuWorker::convert(List<ConvertedTarget> to, const Conversion& how, const std::byte* src) {
  if (to.count == 0) return;
  const auto scales_at = static_cast<size_t>(how.row_bytes());
  converted_.resize(scales_at + static_cast<size_t>(how.scale_bytes()));
  std::byte *row = converted_.data(), *scales = row + scales_at;
  op_.ops->quantize[static_cast<int>(how.from)](row, scales, src, how);
  Target rows[kMaxTopk + 1], beside[kMaxTopk + 1];
  for (int j = 0; j < to.count; ++j) {
    rows[j] = to.items[j].row;
    beside[j] = to.items[j].scales;
  }
  op_.ops->multicast(rows, to.count, row, how.row_bytes());
  op_.ops->multicast(beside, to.count, scales, how.scale_bytes());
}

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
  // Who is gone is asked first: what it said before it went is there by then.
  const uint64_t exited = find_exited(awaited), lost = find_lost(awaited);
  if (find_cause(*this, *op_.peers, op_.id, awaited, phase, record)) return true;
  if (exited) return because(Cause::exited, exited);
  if (lost) return because(Cause::lost, lost);
  if (index_ == 0 && op_.interrupted && op_.interrupted(signalled)) return because(Cause::interrupted, me);
  if (seconds < op_.timeout) return false;
  *record = timeout_record(*this, *op_.peers, op_.id, awaited, phase);
  return true;
}

// What comes from other nodes comes through ranks of this node, in their processes, until they have closed.
uint64_t CpuWorker::find_exited(uint64_t awaited) {
  const uint64_t near = op_.peers->near;
  uint64_t exited = 0, gateways = 0;
  for (uint64_t left = near; left; left &= left - 1) {
    const int p = lowest_bit(left);
    if (!op_.processes->has_exited(p)) continue;
    exited |= bit_of(p);
    uint64_t blamed = 0;
    if (how_departed(*this, *op_.peers, p, &blamed) != kClosed) gateways |= bit_of(p);
  }
  const uint64_t missed = missed_of(*this, *op_.peers, op_.id, exited, awaited);
  return awaited & ~near ? missed | gateways : missed;
}

uint64_t CpuWorker::find_lost(uint64_t awaited) {
  return op_.network ? missed_of(*this, *op_.peers, op_.id, op_.network->lost_ranks(), awaited) : 0;
}

}  // namespace commlib
