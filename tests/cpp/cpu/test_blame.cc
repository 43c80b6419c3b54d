// Ranks that stop in the middle of an operation, and ranks that wait for them through others. For the CPU
// alone: on a simulated GPU time leaps, and no word of another node has come by a deadline.
#include "../operations.h"
#include "../suite.h"

namespace commlib::testing {
namespace {

constexpr double kDeadline = 2;

// All ranks have announced a dispatch; those in `stopped` move no rows, and pass none on. Each of the others
// blames exactly those.
void all_blame(const std::vector<int>& node_of, bool hierarchical, uint64_t stopped) {
  const int ranks = static_cast<int>(node_of.size());
  Random random(400);
  Config config = small_config(ranks);
  config.net.node_of = node_of;
  config.net.hierarchical = hierarchical;
  const Scenario s = random_scenario(config, ranks, {}, random);
  in_ranks(config, ranks, [&](Rank& self) {
    start_dispatch(self, s, {})->under_way.wait();
    self.comm->set_timeout(kDeadline);
    self.meet();
    if (has(stopped, self.rank)) {
      const RoutingRoom room(s, self.rank);
      self.comm->begin_dispatch(room.view, s.asked.weights, s.asked.drop, false);
      return self.meet();
    }
    const CommFailure e = check_throws<CommFailure>([&] { start_dispatch(self, s, {})->under_way.wait(); },
                                                    "a dispatch in which ranks have stopped");
    if (e.failure.record.blamed != stopped) throw Failed(std::string("another is blamed: ") + e.what());
    self.meet();
  });
}

void a_stopped_rank_behind_a_gateway_is_named_by_all() {
  all_blame({0, 0, 1, 1}, true, bit_of(1));
  all_blame({0, 0, 1, 1}, false, bit_of(1));
  all_blame({0, 0, 0, 1, 1}, true, bit_of(4));
}

void all_that_have_stopped_are_named_by_all() {
  all_blame({0, 0, 0, 0}, true, bit_of(1) | bit_of(3));
  all_blame({0, 0, 0, 1, 1, 1}, true, bit_of(1) | bit_of(3));
}

const Suite suite({{"a_stopped_rank_behind_a_gateway_is_named_by_all",
                    a_stopped_rank_behind_a_gateway_is_named_by_all},
                   {"all_that_have_stopped_are_named_by_all", all_that_have_stopped_are_named_by_all}});

}  // namespace
}  // namespace commlib::testing
