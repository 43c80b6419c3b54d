// Ranks as threads of this process, each with its communicator.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "backend.h"
#include "check.h"
#include "slow_network.h"

namespace commlib::testing {

// A barrier of all ranks' threads. Once one has given up, none waits any more.
class Meeting {
 public:
  explicit Meeting(int size) : size_(size) {}
  void meet();
  void give_up();

 private:
  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int here_ = 0;
  uint64_t round_ = 0;
  bool given_up_ = false;
};

// What one rank's thread works with. Whatever it destroys, the others' communicators stay.
struct Rank {
  int rank;
  std::shared_ptr<Communicator> comm;  // the only owner
  Meeting& meeting;
  Random random;     // its own: for what may differ by rank, as sleeps do
  SlowNetwork* net;  // between nodes, where there are several
  // A further communicator of this rank, connected; all ranks call it together.
  std::function<std::shared_ptr<Communicator>(const Config&)> another;

  void meet() { meeting.meet(); }
  void nap_sometimes();  // so that ranks arrive in another order each time
};

// What messages from one rank to another show.
Key test_key(int from, int to);

// Runs `body` on each rank's thread, with connected communicators. `configs`: one for each rank, `rank` and
// `size` filled in here. Rethrows the first exception of any rank; it ends the others' waits.
void in_ranks(const std::vector<Config>& configs, const std::function<void(Rank&)>& body);
void in_ranks(const Config& config, int ranks, const std::function<void(Rank&)>& body);

// A small configuration that suits most tests; capacity for every token of every rank.
Config small_config(int ranks);
// For rows grouped by expert in a slot: none, enough for some ranks, or enough.
int64_t random_room(Random& random);
// A small configuration, random in everything, whose slots have room for some grouped rows.
Config random_grouping(Random& random);

}  // namespace commlib::testing
