// What goes wrong, and how soon every rank knows it.
#include <atomic>
#include <chrono>
#include <thread>

#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

constexpr double kAtOnce =
    10;  // seconds, on a busy machine under a sanitizer; far below the deadline of a minute

Failure failure_of(const std::function<void()>& body, const char* what) {
  return check_throws<CommFailure>(body, what).failure;
}

void check_blames(const Failure& failure, Cause cause, int peer) {
  check_equal(static_cast<int>(failure.record.cause), static_cast<int>(cause), "the cause");
  check(failure.peers() == std::vector<int>{peer}, "the one rank at fault is named");
}

void check_broken(Rank& self, const Scenario& s) {
  const Failure failure = failure_of([&] { start_dispatch(self, s, {}); }, "a call after a failure");
  check_equal(static_cast<int>(failure.record.cause), static_cast<int>(Cause::broken), "the cause");
}

// All ranks dispatch; then rank 1 stays away from `operation`, and the others must report it in time: each at
// its own deadline, or at once when another has given up.
using Operation = void (*)(Rank&, const Dispatched&, const Scenario&);

void stays_away(Operation operation, OpKind kind) {
  constexpr double kDeadline = 0.4;
  Random random(80);
  Config config = small_config(3);
  config.num_sms = 2;
  const Scenario s = random_scenario(config, 3, {}, random);
  std::atomic<int> timeouts{0};
  in_ranks(config, 3, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    self.meet();
    if (self.rank != 1) {
      self.comm->set_timeout(kDeadline);
      const Stopwatch watch;
      const Failure failure = failure_of([&] { operation(self, *d, s); }, "an operation without rank 1");
      check_blames(failure, failure.record.cause == Cause::departed ? Cause::departed : Cause::timeout, 1);
      check_equal(name_of(failure.record.op), name_of(kind), "the operation");
      check(watch.seconds() < kDeadline + kAtOnce, "the deadline is kept");
      if (failure.record.cause == Cause::timeout) {
        ++timeouts;
        check(failure.record.waited_ns >= kDeadline * 1e9, "nobody is given up before the deadline");
      }
      check_broken(self, s);
      const Stopwatch end;
      self.comm.reset();
      check(end.seconds() < kAtOnce, "destruction does not wait");
    }
    self.meet();
  });
  check(timeouts > 0, "the first to give up says that it waited");
}

void a_rank_that_stays_away_from_dispatch_is_named_at_the_deadline() {
  stays_away([](Rank& self, const Dispatched&, const Scenario& s) { start_dispatch(self, s, {}); },
             OpKind::dispatch);
}

void a_rank_that_stays_away_from_redispatch_is_named_at_the_deadline() {
  stays_away([](Rank& self, const Dispatched& d,
                const Scenario& s) { start_redispatch(self, d, s, {})->under_way.wait(); },
             OpKind::redispatch);
}

void a_rank_that_stays_away_from_combine_is_named_at_the_deadline() {
  stays_away([](Rank& self, const Dispatched& d,
                const Scenario& s) { start_combine(self, d, s, {})->under_way.wait(); },
             OpKind::combine);
}

void waiting_for_an_asynchronous_operation_throws_its_failure() {
  stays_away(
      [](Rank& self, const Dispatched& d, const Scenario& s) {
        Manner manner;
        manner.async = true;
        start_combine(self, d, s, manner)->under_way.wait();
      },
      OpKind::combine);
}

// Rank 0's program writes the next batch's ids into the tensor that its dispatch has planned with: rank 1
// would write beyond its results.
void ids_changed_during_a_dispatch_are_found_before_they_do_harm() {
  Config config = small_config(2);
  config.experts = 4;
  config.topk = 2;
  config.slots = 2;
  constexpr int64_t kTokens = 8;
  config.max_tokens = kTokens;
  config.capacity = 2 * kTokens;
  in_ranks(config, 2, [&](Rank& self) {
    Int64s ids;
    for (int64_t t = 0; t < kTokens; ++t) ids.insert(ids.end(), {2, -1});
    RoutingRoom room(config, 2, self.rank, ids);
    Int64s offsets(3), expand_to(2 * kTokens * config.topk);
    room.view.offsets = offsets.data();
    const auto pending = self.comm->begin_dispatch(room.view, false, false, false);
    check_equal(pending->results, self.rank == 1 ? 2 * kTokens : 0, "rows of the result");
    self.meet();
    for (int64_t t = 0; self.rank == 0 && t < kTokens; ++t) ids[t * config.topk + 1] = 3;
    self.meet();
    room.view.rows = pending->rows;
    room.view.expand_to = expand_to.data();
    const int64_t row_bytes = self.comm->layout().row_bytes;
    const Buffer x(kTokens * row_bytes), rows(pending->results * row_bytes), source(pending->results * 16);
    Received received;
    received.rows = const_cast<std::byte*>(rows.data());
    received.source = reinterpret_cast<int64_t*>(const_cast<std::byte*>(source.data()));
    const auto move = [&] {
      const Rows sent{x.data(), row_bytes, kTokens, false, nullptr};
      UnderWay(self, self.comm->finish_dispatch(*pending, sent, room.view, received, false)).wait();
    };
    if (self.rank == 1) check_blames(failure_of(move, "a dispatch with changed ids"), Cause::malformed, 0);
    if (self.rank == 0) move();
    self.meet();
  });
}

void destruction_with_an_operation_under_way_ends_by_the_deadline() {
  Random random(81);
  Config config = small_config(2);
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    self.meet();
    if (self.rank == 0) {
      self.comm->set_timeout(0.3);
      Manner manner;
      manner.async = true;
      const CombinedPtr back = start_combine(self, *d, s, manner);
      const Stopwatch watch;
      self.comm.reset();
      check(watch.seconds() < 0.3 + kAtOnce, "destruction ends by the deadline");
    }
    self.meet();
  });
}

// Rank 1 leaves in one way or another; the others, waiting with a deadline of a minute, know at once.
void leaves(void (*leave)(Rank&)) {
  Random random(82);
  const Config config = small_config(3);
  const Scenario s = random_scenario(config, 3, {}, random);
  in_ranks(config, 3, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    if (self.rank == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      leave(self);
    } else {
      const Stopwatch watch;
      check_blames(failure_of([&] { start_dispatch(self, s, {}); }, "a dispatch without rank 1"),
                   Cause::departed, 1);
      check(watch.seconds() < kAtOnce, "the others know at once");
      check_broken(self, s);
    }
    self.meet();
    if (self.rank == 1 && self.comm) check_broken(self, s);
  });
}

void a_rank_that_closes_fails_the_others_at_once() {
  leaves([](Rank& self) { self.comm->close(); });
}
void a_rank_that_is_destroyed_fails_the_others_at_once() {
  leaves([](Rank& self) { self.comm.reset(); });
}
void a_rank_that_gives_up_fails_the_others_at_once() {
  leaves([](Rank& self) { self.comm->give_up("out of memory"); });
}

void a_rank_that_combines_where_others_dispatch_is_a_mismatch_on_all() {
  Random random(83);
  Config config = small_config(3);
  config.num_sms = 2;
  const Scenario s = random_scenario(config, 3, {}, random);
  in_ranks(config, 3, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    const Stopwatch watch;
    if (self.rank == 1) {
      const Failure failure =
          failure_of([&] { start_combine(self, *d, s, {})->under_way.wait(); }, "a combine among dispatches");
      check_equal(static_cast<int>(failure.record.cause), static_cast<int>(Cause::mismatch), "the cause");
    } else {
      const Failure failure =
          failure_of([&] { start_dispatch(self, s, {}); }, "a dispatch where rank 1 combines");
      check_blames(failure, Cause::mismatch, 1);
      check_contains(describe(failure), "rank 1 called combine", "the text");
    }
    check(watch.seconds() < kAtOnce, "all know at once");
    self.meet();
  });
}

// Rank 0 combines, rank 2 dispatches, and rank 1 comes when both have published it.
void a_mismatch_is_reported_while_another_rank_is_late() {
  Random random(86);
  const Config config = small_config(3);
  const Scenario s = random_scenario(config, 3, {}, random);
  in_ranks(config, 3, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    const auto call = [&] {
      if (self.rank == 0) return start_combine(self, *d, s, {})->under_way.wait();
      start_dispatch(self, s, {});
    };
    if (self.rank != 1) {
      const Failure failure = failure_of(call, "different calls");
      check_blames(failure, Cause::mismatch, self.rank == 0 ? 2 : 0);
    }
    self.meet();
    if (self.rank == 1) failure_of(call, "a call when the others have given up");
    self.meet();
  });
}

void ranks_that_disagree_on_weights_or_overflow_are_a_mismatch_on_all() {
  Random random(84);
  const Config config = small_config(3);
  const Scenario s = random_scenario(config, 3, {}, random);
  for (const bool weights : {false, true}) {
    Scenario t = with_other_values(s, random);
    t.asked.weights = weights;
    t.asked.drop = weights;  // nothing is past capacity, so nothing else changes
    in_ranks(config, 3, [&](Rank& self) {
      const Scenario& mine = self.rank == 1 ? t : s;
      const Failure failure =
          failure_of([&] { start_dispatch(self, mine, {}); }, "a dispatch with disagreement");
      check_equal(static_cast<int>(failure.record.cause), static_cast<int>(Cause::mismatch), "the cause");
      self.meet();
    });
  }
}

void a_bad_expert_id_is_refused_before_anything_is_sent() {
  Random random(85);
  const Config config = small_config(3);
  const Scenario s = random_scenario(config, 3, {}, random);
  in_ranks(config, 3, [&](Rank& self) {
    for (const int64_t bad : {config.experts, int64_t{-2}, int64_t{1} << 40}) {
      if (self.rank == 1) {
        const Int64s ids{0, 1, 2, bad};
        const RoutingRoom room(config, 3, 1, ids);
        const auto error = check_throws<std::invalid_argument>(
            [&] { self.comm->begin_dispatch(room.view, true, false, false); }, "a bad expert id");
        check_contains(error.what(), "topk_idx[1, 1] is " + std::to_string(bad), "the text");
      }
      check_equal(self.comm->slots_in_use(), 0, "slots in use");
      check_round_trip(self, s, s, {});
    }
  });
}

const Suite suite({
    {"a_rank_that_stays_away_from_dispatch_is_named_at_the_deadline",
     a_rank_that_stays_away_from_dispatch_is_named_at_the_deadline},
    {"a_rank_that_stays_away_from_redispatch_is_named_at_the_deadline",
     a_rank_that_stays_away_from_redispatch_is_named_at_the_deadline},
    {"a_rank_that_stays_away_from_combine_is_named_at_the_deadline",
     a_rank_that_stays_away_from_combine_is_named_at_the_deadline},
    {"ids_changed_during_a_dispatch_are_found_before_they_do_harm",
     ids_changed_during_a_dispatch_are_found_before_they_do_harm},
    {"waiting_for_an_asynchronous_operation_throws_its_failure",
     waiting_for_an_asynchronous_operation_throws_its_failure},
    {"destruction_with_an_operation_under_way_ends_by_the_deadline",
     destruction_with_an_operation_under_way_ends_by_the_deadline},
    {"a_rank_that_closes_fails_the_others_at_once", a_rank_that_closes_fails_the_others_at_once},
    {"a_rank_that_is_destroyed_fails_the_others_at_once", a_rank_that_is_destroyed_fails_the_others_at_once},
    {"a_rank_that_gives_up_fails_the_others_at_once", a_rank_that_gives_up_fails_the_others_at_once},
    {"a_rank_that_combines_where_others_dispatch_is_a_mismatch_on_all",
     a_rank_that_combines_where_others_dispatch_is_a_mismatch_on_all},
    {"a_mismatch_is_reported_while_another_rank_is_late", a_mismatch_is_reported_while_another_rank_is_late},
    {"ranks_that_disagree_on_weights_or_overflow_are_a_mismatch_on_all",
     ranks_that_disagree_on_weights_or_overflow_are_a_mismatch_on_all},
    {"a_bad_expert_id_is_refused_before_anything_is_sent",
     a_bad_expert_id_is_refused_before_anything_is_sent},
});

}  // namespace
}  // namespace commlib::testing
