#include "backend/failure.h"

#include <cstdio>

namespace commlib {
namespace {

std::string ranks_text(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

std::string call_text(Call call) {
  std::string text = name_of(call.op);
  if (call.flags & kCallHasWeights)
    text += call.op == OpKind::combine ? " with weight gradients" : " with weights";
  if (call.flags & kCallDrops) text += ", overflow=\"drop\"";
  if (call.flags & kCallInWaves) text += ", in_waves";
  return text;
}

std::string last_words(const FailureRecord& r) {
  if (r.last_call == 0) return "it has not made a call yet";
  return "rank " + std::to_string(r.peer) + " last called " + call_text(Call::unpack(value_of(r.last_call))) +
         " (epoch " + std::to_string(tag_of(r.last_call)) + ")";
}

std::string waited_text(const FailureRecord& r) {
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.1f s", static_cast<double>(r.waited_ns) * 1e-9);
  return seconds;
}

std::string mismatch_text(const std::string& me, const FailureRecord& r) {
  return "but rank " + std::to_string(r.peer) + " called " + call_text(Call::unpack(r.their_call)) +
         " where " + me + " called " + call_text(Call::unpack(r.call)) +
         ". All ranks must make the same calls in the same order, all with topk_weights or all without, and "
         "with the same overflow and in_waves";
}

}  // namespace

std::vector<int> Failure::peers() const {
  if (record.cause != Cause::timeout) return {record.peer};
  std::vector<int> late;
  for (int p = 0; p < kMaxRanks; ++p) {
    if (record.missing >> p & 1) late.push_back(p);
  }
  return late;
}

std::string describe(const Failure& f) {
  const FailureRecord& r = f.record;
  const std::string where =
      std::string(name_of(r.op)) + " (epoch " + std::to_string(r.epoch) + ", phase " + name_of(r.phase) + ")";
  const std::string me = "rank " + std::to_string(f.rank);
  const std::string waited =
      me + " waited " + waited_text(r) + " in " + where + " for " + ranks_text(f.peers());
  switch (r.cause) {
    case Cause::timeout:
      return waited + "; " + last_words(r) + ". Is it alive, and did it make the same call?";
    case Cause::exited:
      return waited + ", whose process has exited; " + last_words(r);
    case Cause::lost:
      return waited + ", to which the connection was lost (" + f.detail + "); " + last_words(r);
    case Cause::left: {
      const bool itself = r.teller == r.peer;
      return waited + "; " +
             (itself ? "it closed the communicator or failed"
                     : "rank " + std::to_string(r.teller) + " gave up on it first") +
             "; " + last_words(r);
    }
    case Cause::mismatch:
      return me + " is in " + where + ", " + mismatch_text(me, r);
    case Cause::damaged:
      return me + " found in " + where + " that what rank " + std::to_string(r.peer) +
             " wrote of its rows does not fit its counts. Were expert ids changed during the call, or does "
             "something else write to its memory?";
    case Cause::interrupted:
      return me + " was interrupted in " + where;
    case Cause::broken:
    case Cause::none:
      break;
  }
  return me + " cannot use this communicator any more: " + f.detail;
}

}  // namespace commlib
