// Rows move in the order of epochs: a dispatch whose counts are known keeps its turn until its rows move.
#include <atomic>
#include <chrono>
#include <thread>

#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

// Rank 0 combines in another thread while its dispatch is between counts and rows. Were that issued first,
// the rows of the dispatch would be taken for arrived.
void another_thread_waits_until_the_rows_of_a_dispatch_have_moved() {
  Random random(120);
  const Config config = small_config(2);
  for (int i = 0; i < rounds(6); ++i) {
    const Scenario s = random_scenario(config, 2, {}, random), next = random_scenario(config, 2, {}, random);
    in_ranks(config, 2, [&](Rank& self) {
      const DispatchedPtr d = start_dispatch(self, s, {});
      check_dispatch(*d);
      CombinedPtr back;
      std::atomic<bool> issued{false};
      std::thread other;
      Manner manner;
      if (self.rank == 0) {
        manner.between = [&] {
          other = std::thread([&] {
            Rank mine{self.rank, self.comm, self.meeting, Random(123), self.net, nullptr};
            back = start_combine(mine, *d, s, {});
            issued = true;
          });
          std::this_thread::sleep_for(std::chrono::milliseconds(50));
          check(!issued, "the combine waits for its turn");
        };
      }
      DispatchedPtr later;
      try {
        later = start_dispatch(self, next, manner);
      } catch (...) {
        if (other.joinable()) other.join();
        throw;
      }
      if (other.joinable()) other.join();
      if (!back) back = start_combine(self, *d, s, {});
      check_dispatch(*later);
      check_combine(self, *back, s);
    });
  }
}

// As from a signal handler that Python runs between the two halves. The dispatch is not harmed.
void the_thread_that_has_begun_a_dispatch_is_refused_other_operations() {
  Random random(121);
  const Config config = small_config(2);
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    Manner manner;
    manner.between = [&] {
      const auto error =
          check_throws<CommFailure>([&] { self.comm->lend_slot(); }, "an operation in between");
      check_contains(error.what(), "in the middle of one of its dispatches", "the text");
      check(self.comm->slots_in_use() > 0, "questions are answered");
    };
    check_dispatch(*start_dispatch(self, s, manner));
  });
}

// The others wait for its rows: they are told at once, and its next operation says why.
void a_dispatch_that_is_begun_and_dropped_ends_the_communicator() {
  Random random(122);
  const Config config = small_config(2);
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    if (self.rank == 0) {
      {
        const RoutingRoom room(s, self.rank);
        self.comm->begin_dispatch(room.view, s.asked.weights, s.asked.drop, false);
        settle(*self.comm);  // a plan on a GPU still fills in the room
      }
      const auto error = check_throws<CommFailure>([&] { self.comm->lend_slot(); }, "the operation after it");
      check_contains(error.what(), "rank 0 began a dispatch and never moved its rows", "the text");
    } else {
      const auto error = check_throws<CommFailure>([&] { check_dispatch(*start_dispatch(self, s, {})); },
                                                   "a dispatch whose rows do not come");
      check_equal(error.failure.record.peer, 0, "the rank to blame");
    }
    self.meet();
  });
}

const Suite suite({{"another_thread_waits_until_the_rows_of_a_dispatch_have_moved",
                    another_thread_waits_until_the_rows_of_a_dispatch_have_moved},
                   {"the_thread_that_has_begun_a_dispatch_is_refused_other_operations",
                    the_thread_that_has_begun_a_dispatch_is_refused_other_operations},
                   {"a_dispatch_that_is_begun_and_dropped_ends_the_communicator",
                    a_dispatch_that_is_begun_and_dropped_ends_the_communicator}});

}  // namespace
}  // namespace commlib::testing
