// What only a simulated device can show: another amount of shared memory, and how much memory is allocated.
#include "cpp/operations.h"
#include "cpp/suite.h"
#include "simt/runtime/connected.h"
#include "simt/runtime/cudart.h"

namespace commlib::testing {
namespace {

// Gives the device this much shared memory, as long as this object lives.
class SharedMemory {
 public:
  explicit SharedMemory(size_t per_sm) : before_(simt::chip) { simt::chip.shared_per_sm = per_sm; }
  ~SharedMemory() { simt::chip = before_; }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

 private:
  simt::Chip before_;
};

// 99 KB for a block, as on compute capability 12.x. Shared memory is allocated to the byte, so a warp whose
// part lay outside would be caught; rows are long enough to go round every ring.
void rings_are_as_large_as_shared_memory_allows() {
  Random random(202);
  const SharedMemory shared(100 << 10);
  for (const DType dtype : {DType::bf16, DType::f32}) {
    Config config = small_config(2);
    config.dtype = dtype;
    config.hidden = 4160;
    config.max_tokens = 40;
    config.capacity = 2 * config.max_tokens;
    config.num_sms = 1;
    const Scenario s = random_scenario(config, 2, {}, random);
    in_ranks(config, 2, [&](Rank& self) { check_round_trip(self, s, s, {}); });
  }
}

Config one_rank() {
  Config config = small_config(1);
  config.share = "fd";
  return config;
}

void a_device_with_too_little_shared_memory_is_refused() {
  const auto machine = make_machine();
  const SharedMemory shared(64 << 10);
  if (simt::chip.major < 9) {
    machine->communicator(one_rank());  // there is no ring
    return;
  }
  const auto error =
      check_throws<std::runtime_error>([&] { machine->communicator(one_rank()); }, "a block with 63 KB");
  check_contains(error.what(), "gives a block 64512 bytes of shared memory", "the text");
}

void communicators_that_come_and_go_take_no_more_memory() {
  const auto machine = make_machine();
  const auto use_one = [&](int ranks, int64_t hidden) {
    Config config = small_config(ranks);
    config.hidden = hidden;
    for (const auto& comm : connected(*machine, config)) comm->close();
  };
  // All of the same shape: the next one uses the memory again.
  use_one(2, 32);
  const size_t two_ranks = simt::allocated_bytes();
  for (int i = 0; i < 4; ++i) use_one(2, 32);
  check_equal(simt::allocated_bytes(), two_ranks, "bytes after five of one shape");
  // Each of another shape: memory that none takes again is freed when the next ones connect.
  for (int i = 1; i < 6; ++i) use_one(2, 32 + 8 * i);
  use_one(2, 32);
  check_equal(simt::allocated_bytes(), two_ranks, "bytes after many shapes");
  // Not while ranks of this process may wait for each other.
  const Communicators alive = connected(*machine, small_config(2));
  use_one(1, 320);
  const size_t kept = simt::allocated_bytes();
  use_one(1, 640);
  check(simt::allocated_bytes() > kept, "nothing is freed beside operations");
  for (const auto& comm : alive) comm->close();
  use_one(1, 320);
  check_equal(simt::allocated_bytes(), kept, "bytes when it has been freed later");
}

// As in a layer in chunks: each rank plans further dispatches while rows of the first are on their way, on a
// device with one SM more for each rank than its rows take. Without it, plans of some ranks would keep rows
// of others, which they wait for, from starting.
void plans_beside_rows_need_one_sm_more_for_each_rank() {
  Random random(204);
  constexpr int kRanks = 3, kBlocks = 2, kChunks = 3;
  simt::resident_blocks = kRanks * (kBlocks + 1);
  for (int round = 0; round < rounds(128); ++round) {
    Config config = small_config(kRanks);
    config.num_sms = kBlocks;
    config.timeout = 10;
    config.slots = kChunks + 1;
    std::vector<Scenario> chunks;
    for (int i = 0; i < kChunks; ++i) chunks.push_back(random_scenario(config, kRanks, {}, random));
    in_ranks(config, kRanks, [&](Rank& self) {
      Manner manner;
      manner.async = true;
      std::vector<DispatchedPtr> sent;
      for (const Scenario& chunk : chunks) sent.push_back(start_dispatch(self, chunk, manner));
      for (const DispatchedPtr& d : sent) check_dispatch(*d);
    });
  }
  simt::resident_blocks = 1 << 30;
}

// Combines of a known routing only queue, however many; a dispatch among them is planned before they run.
void a_plan_is_not_far_ahead_of_what_is_queued() {
  Random random(205);
  Config config = small_config(2);
  config.timeout = 20;
  for (int round = 0; round < 3; ++round) {  // in one of which plans queue with the rest
    const Scenario s = random_scenario(config, 2, {}, random), t = random_scenario(config, 2, {}, random);
    in_ranks(config, 2, [&](Rank& self) {
      const DispatchedPtr known = start_dispatch(self, s, {});
      check_dispatch(*known);
      std::vector<CombinedPtr> queued;
      for (int i = 0; i < 2 * kCallRing + 3; ++i) queued.push_back(start_combine(self, *known, s, {}));
      check_dispatch(*start_dispatch(self, t, {}));
      for (const CombinedPtr& c : queued) check_combine(self, *c, s);
    });
  }
}

// With a deadline of an hour, which simulated time would leap to: the text says that no rank came to it.
void a_launch_that_fails_ends_the_wait_of_others_at_once() {
  Random random(210);
  const Config config = small_config(2);
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    const DispatchedPtr known = start_dispatch(self, s, {});
    check_dispatch(*known);
    self.meet();
    if (self.rank == 0) {
      simt::next_launch_fails = true;
      const auto error = check_throws<std::runtime_error>([&] { start_combine(self, *known, s, {}); },
                                                          "a launch that the device refuses");
      check_contains(error.what(), "combine_kernel", "the text");
      const auto broken =
          check_throws<CommFailure>([&] { start_combine(self, *known, s, {}); }, "the next one");
      check_contains(broken.what(), "rank 0 could not start an operation", "the text");
    } else {
      const auto error = check_throws<CommFailure>(
          [&] { check_combine(self, *start_combine(self, *known, s, {}), s); }, "a combine without rank 0");
      check_equal(static_cast<int>(error.failure.record.cause), static_cast<int>(Cause::departed),
                  "the cause");
      check(error.failure.peers() == std::vector<int>{0}, "the rank at fault is named");
    }
    self.meet();
  });
}

const Suite suite({
    {"a_launch_that_fails_ends_the_wait_of_others_at_once",
     a_launch_that_fails_ends_the_wait_of_others_at_once},
    {"a_plan_is_not_far_ahead_of_what_is_queued", a_plan_is_not_far_ahead_of_what_is_queued},
    {"plans_beside_rows_need_one_sm_more_for_each_rank", plans_beside_rows_need_one_sm_more_for_each_rank},
    {"communicators_that_come_and_go_take_no_more_memory",
     communicators_that_come_and_go_take_no_more_memory},
    {"rings_are_as_large_as_shared_memory_allows", rings_are_as_large_as_shared_memory_allows},
    {"a_device_with_too_little_shared_memory_is_refused", a_device_with_too_little_shared_memory_is_refused},
});

}  // namespace
}  // namespace commlib::testing
