// The text of errors.
#include <sstream>

#include "simt/machine.h"

namespace simt {
namespace {

constexpr size_t kBlocksShown = 16;

// How many threads of a block are in a state, and the first of them.
struct Group {
  unsigned count = 0;
  const Thread* first = nullptr;

  Group(const Block& block, State state) {
    for (const Thread& t : block.threads) {
      if (t.state != state) continue;
      if (count++ == 0) first = &t;
    }
  }
};

std::ostream& operator<<(std::ostream& out, const Block& block) {
  out << name_of(block) << ": " << block.threads.size() << " threads";
  if (Group g(block, State::exited); g.count > 0) out << "; " << g.count << " exited";
  if (Group g(block, State::ready); g.count > 0)
    out << "; " << g.count << " can run, first " << g.first->index;
  if (Group g(block, State::at_barrier); g.count > 0) {
    out << "; " << g.count << " at __syncthreads no. " << g.first->barriers + 1 << ", first "
        << g.first->index;
  }
  if (Group g(block, State::at_collective); g.count > 0) {
    out << "; " << g.count << " at warp collectives, first " << g.first->index << " at "
        << text_of(g.first->kind, g.first->mask);
  }
  if (Group g(block, State::asleep); g.count > 0) {
    out << "; " << g.count << " asleep, first " << g.first->index;
    if (g.first->polled) out << ", who polled " << hex(g.first->polled) << " and saw " << g.first->seen;
  }
  return out;
}

}  // namespace

std::string name_of(const Block& block) {
  return "stream " + std::to_string(block.kernel->stream) + " block " + std::to_string(block.index);
}

std::string name_of(const Thread& thread) {
  return name_of(*thread.block) + " thread " + std::to_string(thread.index);
}

std::string hex(const void* p) {
  std::ostringstream text;
  text << p;
  return text.str();
}

void Machine::report(const std::string& error) {
  if (error_.empty()) error_ = error + " (seed " + std::to_string(config.seed) + ")";
}

void Machine::fail(const std::string& what) {
  report(name_of(*self) + ": " + what);
  throw Failed();
}

void Machine::report_deadlock(const std::string& why) {
  std::ostringstream text;
  text << "deadlock: " << why << " (" << now << " ns of virtual time, " << switches_ << " switches)";
  for (size_t i = 0; i < blocks_.size() && i < kBlocksShown; ++i) text << "\n  " << *blocks_[i];
  if (blocks_.size() > kBlocksShown) text << "\n  and " << blocks_.size() - kBlocksShown << " more blocks";
  for (const auto& [stream, kernels] : streams_) {
    if (kernels.front().waiting.empty()) continue;
    text << "\n  stream " << stream << ": " << kernels.front().waiting.size() << " blocks have not started; "
         << resident_ << " of at most " << config.sms << " are resident";
  }
  report(text.str() + "\n ");
}

}  // namespace simt
