// Dispatches of more rows than a rank has room for.
#include "operations.h"
#include "oversubscribed.h"
#include "suite.h"

namespace commlib::testing {
namespace {

void overflow_is_an_error_on_all_ranks_and_all_may_go_on() {
  Random random(90);
  const Config config = narrow_config(3);
  const Scenario many = oversubscribed(config, 3, false, random);
  const Scenario few = fitting(config, 3, random);
  in_ranks(config, 3, [&](Rank& self) {
    for (int i = 0; i < 5; ++i) {
      const CapacityError error = refusal(self, many);
      check_contains(error.what(), "rank 0 would receive 36 rows, and capacity is 15", "the text");
      check_equal(self.comm->slots_in_use(), 0, "slots in use");
      self.nap_sometimes();
      check_round_trip(self, few, few, {});
    }
  });
}

void dropped_rows_are_counted_and_the_others_arrive() {
  Random random(91);
  for (int round = 0; round < 6; ++round) {
    const int ranks = 2 + round % 3;
    Config config = narrow_config(ranks);
    config.num_sms = 1 + round % 3;
    config.slots = 3;
    if (round % 2 == 1) config.capacity = round;  // fewer than one rank's tokens
    const Scenario s = oversubscribed(config, ranks, true, random);
    const Scenario other = with_other_values(s, random);
    int64_t dropped = 0;
    for (const RankCase& r : s.ranks) dropped += r.dropped;
    check(dropped > 0, "the test drops rows");
    in_ranks(config, ranks, [&](Rank& self) {
      for (const bool zero_copy : {false, true}) {
        Manner manner;
        manner.zero_copy = zero_copy;
        check_round_trip(self, s, other, manner);
      }
    });
  }
}

const Suite suite({{"overflow_is_an_error_on_all_ranks_and_all_may_go_on",
                    overflow_is_an_error_on_all_ranks_and_all_may_go_on},
                   {"dropped_rows_are_counted_and_the_others_arrive",
                    dropped_rows_are_counted_and_the_others_arrive}});

}  // namespace
}  // namespace commlib::testing
