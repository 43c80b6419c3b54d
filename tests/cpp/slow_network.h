// A network between the ranks of one process: late, in any order, and cut at will. Messages are read where
// they lie either when they are sent or when they arrive, at random: both must do. A Transport promises no
// order, not even of the words that one rank sends another, so there is none here.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "check.h"
#include "memory.h"
#include "net/transport.h"

namespace commlib::testing {

class SlowNetwork {
 public:
  SlowNetwork(int ranks, uint64_t seed);

  std::unique_ptr<Transport> transport(int rank);

  // Until mended, nothing comes through to or from this rank; nothing is lost.
  void cut(int rank) { set_cut(rank, true); }
  void mend(int rank) { set_cut(rank, false); }
  // From one rank to another words come through, and chunks do not until no longer withheld.
  void withhold_chunks(int from, int to, bool withheld);
  // Whether messages of this rank have not arrived yet.
  bool has_under_way(int from);
  // From now on every other message of this rank takes up to this long, and words four times as long, so that
  // others overtake them.
  void hold(int rank, int milliseconds);
  // Messages of words that came before older ones of the same sender.
  int64_t overtakings() const { return overtakings_.load(); }
  // A message that no rank has sent.
  void forge(int to, const void* header, size_t header_bytes, Bytes data = {});
  // Called, by the networks of all ranks, for each message as it arrives; may change what it brings.
  using Tamper = std::function<void(int to, const Header&, Bytes&)>;
  void tamper_with(Tamper tamper);
  // The others hear that it is gone, each once all that it sent there has arrived.
  void kill(int rank);
  // The most bytes of chunks that were ever on their way to one rank.
  size_t most_under_way() const { return most_under_way_.load(); }

 private:
  friend class SlowTransport;
  struct Message {
    int from;  // -1: it is forged
    Header header;
    size_t header_bytes;
    const std::byte* data;  // null: there is none
    Bytes read;             // data, once it has been read
    std::chrono::steady_clock::time_point due;

    void read_now();
  };

  Tamper tamper();
  void set_cut(int rank, bool cut);
  void put(int from, int to, const Header& header, const std::byte* data);
  bool take(int rank, Message* message);
  void let_go(int from);
  bool take_death(int rank, int* dead);
  void wait(int rank, int milliseconds);

  std::mutex mutex_;  // guards the members below it
  std::condition_variable changed_;
  std::vector<std::vector<Message>> under_way_;  // by receiver
  std::vector<std::vector<int>> deaths_;         // by the rank that is to hear of them
  std::vector<char> cut_;
  std::set<std::pair<int, int>> withheld_;  // from, to
  std::vector<int> hold_ms_;                // by sender
  Random random_;
  Tamper tamper_;
  std::atomic<size_t> most_under_way_{0};
  std::atomic<int64_t> overtakings_{0};
};

}  // namespace commlib::testing
