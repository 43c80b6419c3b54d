#include "backend/failure.h"

#include <cstdio>

#include "base/type_names.h"

namespace commlib {

std::vector<int> ranks_in(uint64_t mask) {
  std::vector<int> ranks;
  for (; mask; mask &= mask - 1) ranks.push_back(lowest_bit(mask));
  return ranks;
}

namespace {

std::string ranks_text(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

std::string call_text(Call call) {
  std::string text = name_of(call.op);
  if (call.has(kCallHasWeights))
    text += call.op == OpKind::combine ? " with weight gradients" : " with weights";
  if (call.has(kCallDrops)) text += ", overflow=\"drop\"";
  if (call.has(kCallInWaves)) text += ", in_waves";
  if (call.has(kCallBounded)) text += ", bounded";
  if (call.has(kCallGroups)) text += ", layout=\"expert\"";
  if (call.has(kCallSaysFormat)) text += ", rows of another type or width";
  return text;
}

std::string last_words(const FailureRecord& r) {
  if (r.last_call == 0) return "it has not made a call yet";
  return "rank " + std::to_string(r.peer) + " last called " +
         call_text(Call::from_bits(value_of(r.last_call))) + " (epoch " +
         std::to_string(tag_of(r.last_call)) + ")";
}

// The ranks that this one waited for and that wait themselves.
std::string held_up_text(const FailureRecord& r, bool one) {
  const std::vector<int> held_up = ranks_in(r.awaited & ~r.blamed);
  return held_up.empty() ? ""
                         : std::string(one ? ", which holds up " : ", which hold up ") + ranks_text(held_up);
}

std::string waited_text(const FailureRecord& r) {
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.1f s", static_cast<double>(r.waited_ns) * 1e-9);
  return seconds;
}

std::string format_text(uint64_t word) {
  if (word == 0) return "";
  const RowFormat format = RowFormat::from_word(word);
  const auto array = [](const char* what, unsigned type, int64_t bytes) {
    return what + std::to_string(bytes) + " bytes of " + type_name(type);
  };
  return array(" (", format.type & 0xff, format.bytes) +
         (format.scale_bytes ? array(", and scales of ", format.type >> 8, format.scale_bytes) : "") + ")";
}

std::string mismatch_advice(const Call& mine, const Call& theirs) {
  if (!mine.same_caller(theirs)) {
    return ", counted as they were made. Those of one shape and group share a communicator, so all ranks "
           "must use them in the same order; exclusive=True gives one an order of its own";
  }
  if (mine.op == theirs.op && (mine.flags | kCallSaysFormat) == (theirs.flags | kCallSaysFormat)) {
    return ". Rows and scales must be of one type and width on all ranks";
  }
  return ". All ranks must make the same calls in the same order, all with topk_weights or all without, and "
         "with the same layout, overflow and in_waves";
}

std::string mismatch_text(const std::string& me, const FailureRecord& r) {
  const Call mine = Call::from_bits(r.call), theirs = Call::from_bits(r.their_call);
  const auto text = [&](const Call& call, uint64_t format) {
    const std::string caller = " of ExpertParallel " + std::to_string(call.caller);
    return call_text(call) + format_text(format) + (mine.same_caller(theirs) ? "" : caller);
  };
  return "but rank " + std::to_string(r.peer) + " called " + text(theirs, r.their_format) + " where " + me +
         " called " + text(mine, r.format) + mismatch_advice(mine, theirs);
}

}  // namespace

std::vector<int> Failure::peers() const { return ranks_in(record.blamed); }

std::string describe(const Failure& f) {
  const FailureRecord& r = f.record;
  const std::string where =
      std::string(name_of(r.op)) + " (epoch " + std::to_string(r.epoch) + ", phase " + name_of(r.phase) + ")";
  const std::string me = "rank " + std::to_string(f.rank);
  const bool one = f.peers().size() == 1;
  const std::string waited =
      me + " waited " + waited_text(r) + " in " + where + " for " + ranks_text(f.peers());
  switch (r.cause) {
    case Cause::timeout:
      return waited + held_up_text(r, one) + "; " + last_words(r) +
             (one ? ". Is it alive, and did it make the same call?"
                  : ". Are they alive, and did they make the same call?");
    case Cause::exited:
      return waited + ", whose process has exited; " + last_words(r);
    case Cause::lost:
      return waited + ", to which the connection was lost (" + f.detail + "); " + last_words(r);
    case Cause::departed: {
      const std::string reporter = "rank " + std::to_string(r.reporter);
      if (r.blamed == bit_of(r.reporter))
        return waited + "; it closed the communicator or failed; " + last_words(r);
      if (r.blamed == bit_of(f.rank))
        return me + " came late in " + where + ": " + reporter + " has given up on it";
      return waited + "; " + reporter + " gave up on " + (one ? "it" : "them") + " first; " + last_words(r);
    }
    case Cause::mismatch:
      return me + " is in " + where + ", " + mismatch_text(me, r);
    case Cause::malformed:
      return me + " is in " + where + ", and rank " + std::to_string(r.peer) +
             " sent what does not fit it: rows or tokens that there are not, or a chunk of another "
             "operation. "
             "Were expert ids changed during the call, do all ranks run the same version of commlib, and "
             "does "
             "anything write into its memory?";
    case Cause::interrupted:
      return me + " was interrupted in " + where;
    case Cause::overlap:
      return me + " ran " + where +
             " of a CUDA graph beside another operation of the same communicator. Wait for what is "
             "asynchronous (event.wait(), synchronize()) before a graph with operations is launched, and for "
             "the graph before the next operation";
    case Cause::broken:
    case Cause::none:
      break;
  }
  return me + " cannot use this communicator any more: " + f.detail;
}

}  // namespace commlib
