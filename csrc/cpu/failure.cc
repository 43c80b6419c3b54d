#include "cpu/failure.h"

#include <cstdio>

namespace commlib {
namespace {

std::string ranks_text(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", seconds);
  return text;
}

}  // namespace

std::string describe(const Failure& f) {
  const std::string where =
      std::string(name_of(f.op)) + " (epoch " + std::to_string(f.epoch) + ", phase " + name_of(f.phase) + ")";
  const std::string me = "rank " + std::to_string(f.rank);
  switch (f.cause) {
    case Cause::timeout:
      return me + " waited " + seconds_text(f.seconds) + " in " + where + " for " + ranks_text(f.peers) +
             "; " + f.detail + ". Is it alive, and did it make the same call?";
    case Cause::exited:
      return me + " waited in " + where + " for " + ranks_text(f.peers) + ", whose process has exited; " +
             f.detail;
    case Cause::left:
      return me + " waited " + seconds_text(f.seconds) + " in " + where + " for " + ranks_text(f.peers) +
             "; " + f.detail;
    case Cause::mismatch:
      return me + " is in " + where + ", but " + f.detail +
             ". All ranks must make the same calls in the same order, all with topk_weights or all without, "
             "and with "
             "the same overflow";
    case Cause::interrupted:
      return me + " was interrupted in " + where;
    case Cause::broken:
      return me + " cannot use this communicator any more: " + f.detail;
  }
  return where;
}

}  // namespace commlib
