// Slots and leases: what may hold memory, and how long.
#include <thread>

#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

void slots_in_use_are_counted_and_none_left_is_an_error() {
  Random random(40);
  Config config = small_config(2);
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    std::vector<std::shared_ptr<SlotLease>> held;
    for (int i = 0; i < config.slots; ++i) {
      check_equal(self.comm->slots_in_use(), i, "slots in use");
      held.push_back(lend_slot(self));
      check_equal(held.back()->index(), i, "the first free slot");
    }
    const auto refused =
        check_throws<SlotError>([&] { start_dispatch(self, s, {}); }, "a dispatch without a slot");
    check_contains(refused.what(), "all 2 slots are in use", "the text");
    check_throws<SlotError>([&] { lend_slot(self); }, "a third lent slot");
    // Nothing was said to the others, so all may go on.
    held.clear();
    check_equal(self.comm->slots_in_use(), 0, "slots in use");
    check_round_trip(self, s, s, {});
  });
}

void a_slot_under_way_is_waited_for() {
  Random random(41);
  Config config = small_config(2);
  config.slots = 1;
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    Manner manner;
    manner.async = true;
    for (int i = 0; i < rounds(10); ++i) {
      const DispatchedPtr d = start_dispatch(self, s, manner);
      const DispatchedPtr again = start_redispatch(self, *d, s, manner);  // in the same slot
      check_dispatch(*d);
      check_redispatch(*again);
    }
  });
}

void a_lent_slot_serves_one_combine() {
  Random random(42);
  Config config = small_config(2);
  Asked asked;
  asked.may_group = false;
  const Scenario s = random_scenario(config, 2, asked, random);
  in_ranks(config, 2, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    const std::shared_ptr<SlotLease> lent = lend_slot(self);
    const Buffer rows(d->routing.rows * s.row_bytes());
    copy_bytes(lent->slot().rows, rows.data(), static_cast<size_t>(rows.bytes()));
    CombineInput input;
    input.y = lent->slot().rows;
    input.stride = s.row_bytes();
    Buffer out(d->mine().tokens * s.row_bytes());
    UnderWay(self, self.comm->combine(input, d->routing, out.data(), nullptr, false)).wait();
    check_throws<SlotError>([&] { self.comm->combine(input, d->routing, out.data(), nullptr, false); },
                            "the second combine from a lent slot");
    check_round_trip(self, s, s, {});
  });
}

void a_lease_keeps_memory_mapped_after_its_communicator() {
  Random random(43);
  Config config = small_config(2);
  Asked asked;
  asked.may_group = false;
  const Scenario s = random_scenario(config, 2, asked, random);
  std::vector<DispatchedPtr> kept(2);
  in_ranks(config, 2, [&](Rank& self) {
    Manner manner;
    manner.zero_copy = true;
    kept[self.rank] = start_dispatch(self, s, manner);
    check_dispatch(*kept[self.rank]);
  });
  for (const DispatchedPtr& d : kept) {
    check_bytes(d->data(), d->mine().received, "rows are there when the communicators are gone");
  }
}

void leases_may_be_released_on_any_thread() {
  Random random(44);
  Config config = small_config(2);
  Asked asked;
  asked.may_group = false;
  std::vector<Scenario> batches;
  for (int i = 0; i < rounds(20); ++i) batches.push_back(random_scenario(config, 2, asked, random));
  in_ranks(config, 2, [&](Rank& self) {
    std::thread other;
    Manner manner;
    manner.zero_copy = true;
    for (const Scenario& s : batches) {
      DispatchedPtr d = start_dispatch(self, s, manner);
      check_dispatch(*d);
      if (other.joinable()) other.join();
      other = std::thread([d = std::move(d)]() mutable {
        check_bytes(d->data(), d->mine().received, "rows can be read on another thread");
        d.reset();
      });
    }
    other.join();
  });
}

const Suite suite({{"slots_in_use_are_counted_and_none_left_is_an_error",
                    slots_in_use_are_counted_and_none_left_is_an_error},
                   {"a_slot_under_way_is_waited_for", a_slot_under_way_is_waited_for},
                   {"a_lent_slot_serves_one_combine", a_lent_slot_serves_one_combine},
                   {"a_lease_keeps_memory_mapped_after_its_communicator",
                    a_lease_keeps_memory_mapped_after_its_communicator},
                   {"leases_may_be_released_on_any_thread", leases_may_be_released_on_any_thread}});

}  // namespace
}  // namespace commlib::testing
