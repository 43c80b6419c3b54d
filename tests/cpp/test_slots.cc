// Slots, leases and pooled buffers: who may hold memory, and how long.
#include <unistd.h>

#include <cstring>
#include <thread>

#include "operations.h"

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
      held.push_back(self.comm->lend_slot());
      check_equal(held.back()->index(), i, "the first free slot");
    }
    const auto refused =
        check_throws<SlotError>([&] { start_dispatch(self, s, {}); }, "a dispatch without a slot");
    check_contains(refused.what(), "all 2 slots are in use", "the text");
    check_throws<SlotError>([&] { self.comm->lend_slot(); }, "a third lent slot");
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
    for (int i = 0; i < 10; ++i) {
      const DispatchedPtr d = start_dispatch(self, s, manner);
      const DispatchedPtr again = start_redispatch(self, *d, s, manner);  // in the same slot
      check_dispatch(self, *d);
      check_redispatch(self, *again);
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
    const std::shared_ptr<SlotLease> lent = self.comm->lend_slot();
    std::memset(lent->slot().rows, 0, static_cast<size_t>(d->routing.rows * s.row_bytes()));
    CombineInput input;
    input.y = lent->slot().rows;
    input.stride = s.row_bytes();
    Buffer out(d->mine().tokens * s.row_bytes());
    self.comm->combine(input, d->routing, out.data(), nullptr, false);
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
    check_dispatch(self, *kept[self.rank]);
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
  for (int i = 0; i < 20; ++i) batches.push_back(random_scenario(config, 2, asked, random));
  in_ranks(config, 2, [&](Rank& self) {
    std::thread other;
    Manner manner;
    manner.zero_copy = true;
    for (const Scenario& s : batches) {
      DispatchedPtr d = start_dispatch(self, s, manner);
      check_dispatch(self, *d);
      if (other.joinable()) other.join();
      other = std::thread([d = std::move(d)]() mutable {
        check_bytes(d->data(), d->mine().received, "rows can be read on another thread");
        d.reset();
      });
    }
    other.join();
  });
}

void only_touched_slots_take_memory() {
  Random random(45);
  Config config = small_config(2);
  config.slots = 8;
  config.hidden = 4096;
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    for (int i = 0; i < 3; ++i) check_round_trip(self, s, s, {});
    check(self.comm->heap_bytes() >= 8 * self.comm->layout().bytes(), "the heap has eight slots");
    check(self.comm->touched_bytes() <= 3 * self.comm->layout().bytes(), "few are ever touched");
  });
}

void pooled_buffers_are_used_again_and_outlive_their_pool() {
  auto pool = std::make_shared<BufferPool>();
  std::shared_ptr<void> kept = pool->take(5000);
  void* const first = kept.get();
  check_equal(pool->idle_bytes(), size_t{0}, "idle bytes");
  kept.reset();
  check(pool->idle_bytes() >= 5000, "a buffer goes back");
  kept = pool->take(4000);
  check(kept.get() == first, "a buffer is used again");
  pool.reset();
  std::memset(kept.get(), 1, 4000);
}

void a_heap_of_this_process_is_mapped_once_and_one_that_is_gone_is_an_error() {
  auto region = Region::create(5000);
  const int fd = region->fd();
  check(Region::open(getpid(), fd, 5000) == region, "the same mapping");
  check_equal(static_cast<int>(region->data()[4999]), 0, "the last byte");
  region.reset();
  const auto error =
      check_throws<std::runtime_error>([&] { Region::open(getpid(), fd, 5000); }, "a heap that is gone");
  check_contains(error.what(), "no heap " + std::to_string(fd), "the text");
}

void a_buffer_may_be_empty() {
  auto pool = std::make_shared<BufferPool>();
  pool->take(0).reset();
}

}  // namespace

std::vector<Test> slot_tests() {
  return {{"slots_in_use_are_counted_and_none_left_is_an_error",
           slots_in_use_are_counted_and_none_left_is_an_error},
          {"a_slot_under_way_is_waited_for", a_slot_under_way_is_waited_for},
          {"a_lent_slot_serves_one_combine", a_lent_slot_serves_one_combine},
          {"a_lease_keeps_memory_mapped_after_its_communicator",
           a_lease_keeps_memory_mapped_after_its_communicator},
          {"leases_may_be_released_on_any_thread", leases_may_be_released_on_any_thread},
          {"only_touched_slots_take_memory", only_touched_slots_take_memory},
          {"pooled_buffers_are_used_again_and_outlive_their_pool",
           pooled_buffers_are_used_again_and_outlive_their_pool},
          {"a_heap_of_this_process_is_mapped_once_and_one_that_is_gone_is_an_error",
           a_heap_of_this_process_is_mapped_once_and_one_that_is_gone_is_an_error},
          {"a_buffer_may_be_empty", a_buffer_may_be_empty}};
}

}  // namespace commlib::testing
