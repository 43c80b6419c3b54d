// Rows of other types and widths than the communicator's own, and scales beside them.
#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

constexpr int kRoomElements = 64;  // float32

Config roomy(int ranks, Random& random) {
  Config config = small_config(ranks);
  config.hidden = kRoomElements;
  config.dtype = DType::f32;
  config.slots = 4;
  config.grouped_rows = random_room(random);
  config.topk = 1 + static_cast<int>(random.below(4));
  config.num_sms = 1 + static_cast<int>(random.below(3));
  return config;
}

// The routing of a scenario, with rows of a type and width that have room, and values of its own.
Scenario with_rows(const Scenario& s, DType dtype, int64_t hidden, Random& random) {
  Config config = s.config;
  config.dtype = dtype;
  config.hidden = hidden;
  return with_other_values(s, random, config);
}

Scenario with_any_rows(const Scenario& s, Random& random) {
  constexpr DType kTypes[] = {DType::bf16, DType::f16, DType::f32};
  const DType dtype = kTypes[random.below(3)];
  const int64_t most = kRoomElements / 2;  // leaves room for scales
  const int64_t hidden = random.one_in(2) ? most : 1 + static_cast<int64_t>(random.below(most));
  return with_rows(s, dtype, hidden, random);
}

Manner any_format(Manner manner, Random& random) {
  constexpr int64_t kScales[] = {0, 1, 4, 7, 16, 32};
  manner.says_format = true;
  manner.scale_bytes = kScales[random.below(6)];
  return manner;
}

// A dispatch in one format, a redispatch along its routing in another, a combine in a third.
void check_formats(Rank& self, const Scenario (&s)[3], int64_t scales_of_first, int64_t scales_of_second) {
  Manner manner = random_manner(self.random);
  manner.says_format = true;
  manner.scale_bytes = scales_of_first;
  const DispatchedPtr d = start_dispatch(self, s[0], manner);
  check_dispatch(*d);
  check_scales(self, *d, d->source);
  manner.scale_bytes = scales_of_second;
  const DispatchedPtr again = start_redispatch(self, *d, s[1], manner);
  check_redispatch(*again);
  check_scales(self, *again, d->source);
  manner.scale_bytes = 0;
  check_combine(self, *start_combine(self, *d, s[2], manner), s[2]);
}

void one_handle_serves(Config config, const Asked& asked, Random& random) {
  const int ranks = config.size;
  const Scenario own = random_scenario(config, ranks, asked, random);
  const Scenario formats[3] = {with_any_rows(own, random), with_any_rows(own, random),
                               with_any_rows(own, random)};
  const int64_t first = any_format({}, random).scale_bytes, second = any_format({}, random).scale_bytes;
  in_ranks(config, ranks, [&](Rank& self) {
    check_formats(self, formats, first, second);
    check_round_trip(self, own, own, random_manner(self.random));  // and its own rows, as ever
  });
}

void one_handle_serves_rows_of_any_type_and_width() {
  Random random(140);
  for (int i = 0; i < rounds(30); ++i) {
    Asked asked;
    asked.weights = random.one_in(2);
    asked.weight_grads = random.one_in(2);
    one_handle_serves(roomy(1 + static_cast<int>(random.below(4)), random), asked, random);
  }
}

void one_handle_serves_rows_of_any_type_between_nodes() {
  Random random(141);
  for (const bool hierarchical : {true, false}) {
    for (int i = 0; i < rounds(6); ++i) {
      Config config = roomy(4, random);
      config.net.node_of = {0, 0, 1, 1};
      config.net.hierarchical = hierarchical;
      config.net.chunk_bytes = 600;
      config.net.chunks = 2;
      Asked asked;
      asked.weights = random.one_in(2);
      one_handle_serves(config, asked, random);
    }
  }
}

void rows_and_scales_may_fill_the_room() {
  Random random(145);
  for (const bool nodes : {false, true}) {
    Config config = roomy(4, random);
    if (nodes) config.net.node_of = {0, 1, 0, 1};
    const Scenario own = random_scenario(config, 4, {}, random);
    const Scenario formats[3] = {with_rows(own, DType::bf16, 127, random),
                                 with_rows(own, DType::f16, 101, random),
                                 with_rows(own, DType::f16, 128, random)};
    const int64_t room = own.row_bytes();
    in_ranks(config, 4, [&](Rank& self) {
      check_formats(self, formats, room - formats[0].row_bytes(), room - formats[1].row_bytes());
    });
  }
}

void rows_of_any_format_come_in_waves() {
  Random random(142);
  for (int i = 0; i < rounds(8); ++i) {
    const Config config = roomy(3, random);
    Asked asked;
    asked.waves = true;
    const Scenario own = random_scenario(config, 3, asked, random);
    const Scenario s = with_any_rows(own, random);
    const Manner manner = any_format({}, random);
    in_ranks(config, 3, [&](Rank& self) {
      Manner mine = manner;
      mine.async = true;
      const DispatchedPtr d = start_dispatch(self, s, mine);
      for (int64_t e = 0; e < s.placement().count(self.rank); ++e) check_expert(self, *d, e);
      check_dispatch(*d);
      check_scales(self, *d, d->source);
    });
  }
}

// What each rank dispatches, redispatches or combines differs in type or width: nothing is taken for it.
void formats_that_differ_are_a_mismatch_on_all(OpKind op) {
  Random random(143);
  const Config config = roomy(3, random);
  const Scenario own = random_scenario(config, 3, {}, random);
  const Scenario narrow = with_rows(own, DType::bf16, 32, random),
                 wide = with_rows(own, DType::f32, 32, random);
  for (const bool one_says_none : {false, true}) {
    in_ranks(config, 3, [&](Rank& self) {
      const DispatchedPtr d = start_dispatch(self, own, {});
      check_dispatch(*d);
      Manner manner;
      manner.says_format = self.rank != 1 || !one_says_none;
      const Scenario& mine = self.rank != 1 ? narrow : one_says_none ? own : wide;
      const auto error =
          check_throws<CommFailure>([&] { run_operation(self, op, *d, mine, manner); }, "rows that differ");
      check_equal(static_cast<int>(error.failure.record.cause), static_cast<int>(Cause::mismatch),
                  "the cause");
      check_contains(error.what(), "Rows and scales must be of one type and width on all ranks", "the text");
      check_contains(error.what(), "(64 bytes of bfloat16)", "the text");
      self.meet();
    });
  }
}
void dispatches_of_different_rows_are_a_mismatch() {
  formats_that_differ_are_a_mismatch_on_all(OpKind::dispatch);
}
void redispatches_of_different_rows_are_a_mismatch() {
  formats_that_differ_are_a_mismatch_on_all(OpKind::redispatch);
}
void combines_of_different_rows_are_a_mismatch() {
  formats_that_differ_are_a_mismatch_on_all(OpKind::combine);
}

// Rank 1 comes when ranks 0 and 2, whose rows differ, have both said so, and one of them may have given up.
void a_mismatch_of_rows_is_reported_while_another_rank_is_late() {
  Random random(146);
  const Config config = roomy(3, random);
  const Scenario own = random_scenario(config, 3, {}, random);
  const Scenario narrow = with_rows(own, DType::bf16, 32, random),
                 wide = with_rows(own, DType::f32, 32, random);
  in_ranks(config, 3, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, own, {});
    check_dispatch(*d);
    Manner manner;
    manner.says_format = true;
    const auto call = [&] {
      start_redispatch(self, *d, self.rank == 2 ? wide : narrow, manner)->under_way.wait();
    };
    if (self.rank != 1) {
      const auto error = check_throws<CommFailure>(call, "rows that differ");
      check_equal(static_cast<int>(error.failure.record.cause), static_cast<int>(Cause::mismatch),
                  "the cause");
      check_equal(error.failure.record.peer, 2 - self.rank, "the rank to blame");
    }
    self.meet();
    if (self.rank == 1) check_throws<CommFailure>(call, "a call when the others have given up");
    self.meet();
  });
}

void rows_without_room_are_refused_before_anything_is_sent() {
  Random random(144);
  const Config config = roomy(2, random);
  const Scenario own = random_scenario(config, 2, {}, random);
  const int64_t room = own.row_bytes();
  in_ranks(config, 2, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, own, {});
    check_dispatch(*d);
    if (self.rank == 1) {
      const RowFormat bad[] = {{5, room + 1, 0}, {5, room, 1}, {5, room - 8, 16},
                               {5, 0, 4},        {5, 8, -4},   {5, 8, int64_t{1} << 40}};
      for (const RowFormat& format : bad) {
        const RoutingRoom routing(own, self.rank);
        check_throws<std::invalid_argument>(
            [&] { self.comm->begin_dispatch(routing.view, true, false, false, false, 0, format); },
            "a dispatch");
        Rows rows;
        rows.format = format;
        check_throws<std::invalid_argument>(
            [&] { self.comm->redispatch(rows, d->routing, {}, false, nullptr); }, "a redispatch");
        CombineInput input;
        input.format = format;
        input.dtype = DType::bf16;
        check_throws<std::invalid_argument>(
            [&] { self.comm->combine(input, d->routing, nullptr, nullptr, false); }, "a combine");
      }
      CombineInput wide;
      wide.format = {4, 64, 0};
      wide.dtype = DType::f64;
      const auto error = check_throws<std::invalid_argument>(
          [&] { self.comm->combine(wide, d->routing, nullptr, nullptr, false); }, "a sum in float64");
      check_contains(error.what(), "float64 rows only", "the text");
    }
    check_round_trip(self, own, own, {});
  });
}

const Suite suite({
    {"one_handle_serves_rows_of_any_type_and_width", one_handle_serves_rows_of_any_type_and_width},
    {"one_handle_serves_rows_of_any_type_between_nodes", one_handle_serves_rows_of_any_type_between_nodes},
    {"rows_and_scales_may_fill_the_room", rows_and_scales_may_fill_the_room},
    {"rows_of_any_format_come_in_waves", rows_of_any_format_come_in_waves},
    {"a_mismatch_of_rows_is_reported_while_another_rank_is_late",
     a_mismatch_of_rows_is_reported_while_another_rank_is_late},
    {"dispatches_of_different_rows_are_a_mismatch", dispatches_of_different_rows_are_a_mismatch},
    {"redispatches_of_different_rows_are_a_mismatch", redispatches_of_different_rows_are_a_mismatch},
    {"combines_of_different_rows_are_a_mismatch", combines_of_different_rows_are_a_mismatch},
    {"rows_without_room_are_refused_before_anything_is_sent",
     rows_without_room_are_refused_before_anything_is_sent},
});

}  // namespace
}  // namespace commlib::testing
