// How much memory a rank on the CPU takes, and what keeps it.
#include <unistd.h>

#include <cstring>

#include "../operations.h"
#include "../suite.h"
#include "cpu/buffers.h"
#include "heap/symmetric_heap.h"

namespace commlib::testing {
namespace {

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

const Suite suite({{"only_touched_slots_take_memory", only_touched_slots_take_memory},
                   {"pooled_buffers_are_used_again_and_outlive_their_pool",
                    pooled_buffers_are_used_again_and_outlive_their_pool},
                   {"a_heap_of_this_process_is_mapped_once_and_one_that_is_gone_is_an_error",
                    a_heap_of_this_process_is_mapped_once_and_one_that_is_gone_is_an_error},
                   {"a_buffer_may_be_empty", a_buffer_may_be_empty}});

}  // namespace
}  // namespace commlib::testing
