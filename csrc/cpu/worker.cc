#include "cpu/worker.h"

#include <algorithm>

namespace commlib {
namespace {

std::string describe_call(Call call) {
  std::string text = name_of(call.op);
  if (call.flags & kCallHasWeights)
    text += call.op == OpKind::combine ? " with weight gradients" : " with weights";
  if (call.flags & kCallDrops) text += ", overflow=\"drop\"";
  return text;
}

}  // namespace

// The newest call that `peer` told this rank of.
std::string CpuWorker::last_words(int peer) const {
  uint64_t newest = 0;
  for (const uint64_t& word : op_.peers->mail_from(peer).calls) {
    const uint64_t w = load_word(&word);
    const bool said = Call::unpack(value_of(w)).op != OpKind::none;
    if (said && (newest == 0 || reached(tag_of(w), tag_of(newest)))) newest = w;
  }
  if (newest == 0) return "it has not made a call yet";
  return "rank " + std::to_string(peer) + " last called " + describe_call(Call::unpack(value_of(newest))) +
         " (epoch " + std::to_string(tag_of(newest)) + ")";
}

// Whether `peer` has come as far as this operation.
bool CpuWorker::has_called(int peer) const {
  for (const uint64_t& word : op_.peers->mail_from(peer).calls) {
    const uint64_t w = load_word(&word);
    if (Call::unpack(value_of(w)).op != OpKind::none && reached(tag_of(w), op_.epoch)) return true;
  }
  return false;
}

bool CpuWorker::fail(Cause cause, int peer, Phase phase, double start, std::string detail) {
  std::vector<int> peers{peer};
  for (int p = 0; cause == Cause::timeout && p < op_.peers->size; ++p) {
    if (p != peer && p != op_.peers->rank && !has_called(p)) peers.push_back(p);
  }
  std::sort(peers.begin(), peers.end());
  std::lock_guard<std::mutex> lock(op_.mutex);
  if (!op_.failed.load(std::memory_order_relaxed)) {
    op_.failure = {cause,
                   op_.peers->rank,
                   std::move(peers),
                   op_.call.op,
                   phase,
                   op_.epoch,
                   monotonic_seconds() - start,
                   std::move(detail)};
    op_.failed.store(true, std::memory_order_release);
  }
  return true;
}

bool CpuWorker::mismatch(int peer, Call theirs) {
  fail(Cause::mismatch, peer, Phase::call, monotonic_seconds(),
       "rank " + std::to_string(peer) + " called " + describe_call(theirs) + " where rank " +
           std::to_string(op_.peers->rank) + " called " + describe_call(op_.call));
  return false;
}

// Whether a rank left that this operation needs: one that gave up, whichever it is, or one that closed its
// communicator before it came here.
bool CpuWorker::someone_left(int peer, Phase phase, double start) {
  for (int i = 0; i < op_.peers->size; ++i) {
    const int p = (peer + i) % op_.peers->size;  // the awaited peer first: its own word is the best reason
    const uint64_t left = load_word(&op_.peers->mail_from(p).left);
    const bool needed = tag_of(left) == kGaveUp || (tag_of(left) == kClosed && (p == peer || !has_called(p)));
    if (p == op_.peers->rank || !needed) continue;
    const int blamed = static_cast<int>(value_of(left));
    std::string detail = blamed == p ? "it closed the communicator or failed"
                                     : "rank " + std::to_string(p) + " gave up on it first";
    detail += "; " + last_words(blamed);
    return fail(Cause::left, blamed, phase, start, std::move(detail));
  }
  return false;
}

// Whether any rank made another call at this place in the order: the cause, whatever else is late for it.
bool CpuWorker::someone_calls_otherwise() {
  for (int p = 0; p < op_.peers->size; ++p) {
    const uint64_t word = load_word(&op_.peers->mail_from(p).calls[op_.epoch % kCallRing]);
    const Call theirs = Call::unpack(value_of(word));
    if (tag_of(word) == op_.epoch && theirs.op != OpKind::none && !theirs.agrees_with(op_.call)) {
      return !mismatch(p, theirs);
    }
  }
  return false;
}

bool CpuWorker::gives_up(int peer, Phase phase, double start) {
  if (op_.failed.load(std::memory_order_acquire)) return true;
  if (phase != Phase::slot_reuse && someone_calls_otherwise()) return true;
  if (someone_left(peer, phase, start)) return true;
  if (op_.processes->has_exited(peer)) return fail(Cause::exited, peer, phase, start, last_words(peer));
  if (index_ == 0 && op_.interrupted && op_.interrupted())
    return fail(Cause::interrupted, peer, phase, start, "");
  if (monotonic_seconds() - start < op_.timeout) return false;
  return fail(Cause::timeout, peer, phase, start, last_words(peer));
}

}  // namespace commlib
