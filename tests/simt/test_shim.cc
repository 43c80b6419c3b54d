// The shim itself: that it runs kernels rightly, and catches kernels that are wrong.
#include <string>
#include <vector>

#include "cpp/suite.h"
#include "cuda/ptx.cuh"
#include "simt/simt.h"

namespace commlib::testing {
namespace {

using simt::Config;
using simt::Result;
using simt::Simulation;

constexpr int kMostRanks = 8;

Config config_of(uint64_t seed, bool delay_stores) {
  Config config;
  config.seed = seed;
  config.delay_stores = delay_stores;
  return config;
}

// -- all-to-all: every block of every rank sends its slice to the same block of all ranks, then raises a flag
// ------

struct Exchange {
  int rank, ranks;
  unsigned vectors;                  // of 16 bytes, from one block to another
  ptx::Vec16* received[kMostRanks];  // at each rank: [source][block][vectors]
  uint64_t* arrived[kMostRanks];     // at each rank: [source][block], written once all vectors are in place
  uint32_t* wrong;                   // vectors that were not as sent

  unsigned place(int source) const { return static_cast<unsigned>(source) * gridDim.x + blockIdx.x; }
};

enum class Bug { none, relaxed_flag, no_barrier_before_flag, no_barrier_after_wait };

ptx::Vec16 message(int source, int target, unsigned block, unsigned i) {
  return {{static_cast<uint32_t>(source + 1), static_cast<uint32_t>(target + 1), block + 1, i + 1}};
}

bool equal(const ptx::Vec16& a, const ptx::Vec16& b) {
  return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] && a.word[3] == b.word[3];
}

template <Bug kBug>
__global__ void __launch_bounds__(256) exchange(const __grid_constant__ Exchange e) {
  for (int p = 0; p < e.ranks; ++p) {
    ptx::Vec16* to = e.received[p] + e.place(e.rank) * e.vectors;
    for (unsigned i = threadIdx.x; i < e.vectors; i += blockDim.x) {
      ptx::store_global(to + i, message(e.rank, p, blockIdx.x, i));
    }
  }
  if (kBug != Bug::no_barrier_before_flag) __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < e.ranks) {
    uint64_t* flag = e.arrived[peer] + e.place(e.rank);
    if (kBug == Bug::relaxed_flag) {
      simt::store_relaxed(flag, 1);
    } else {
      ptx::store_release_sys(flag, 1);
    }
    while (ptx::load_acquire_sys(e.arrived[e.rank] + e.place(peer)) == 0) ptx::nanosleep(100);
  }
  if (kBug != Bug::no_barrier_after_wait) __syncthreads();
  for (int s = 0; s < e.ranks; ++s) {
    const ptx::Vec16* from = e.received[e.rank] + e.place(s) * e.vectors;
    for (unsigned i = threadIdx.x; i < e.vectors; i += blockDim.x) {
      if (!equal(ptx::load_global(from + i), message(s, e.rank, blockIdx.x, i)))
        ptx::add_relaxed_gpu(e.wrong, 1);
    }
  }
}

struct Shape {
  int ranks;
  unsigned blocks, threads, vectors;
};
constexpr Shape kSmall{3, 2, 64, 96};

struct Outcome {
  Result result;
  uint32_t wrong;

  bool right() const { return result.ok() && wrong == 0; }
};

template <Bug kBug>
Outcome run_exchange(const Config& config, const Shape& shape) {
  const size_t words = static_cast<size_t>(shape.ranks) * shape.blocks;
  std::vector<std::vector<ptx::Vec16>> received(shape.ranks, std::vector<ptx::Vec16>(words * shape.vectors));
  std::vector<std::vector<uint64_t>> arrived(shape.ranks, std::vector<uint64_t>(words));
  uint32_t wrong = 0;
  Simulation simulation(config);
  for (int r = 0; r < shape.ranks; ++r) {
    Exchange e{r, shape.ranks, shape.vectors, {}, {}, &wrong};
    for (int p = 0; p < shape.ranks; ++p) {
      e.received[p] = received[p].data();
      e.arrived[p] = arrived[p].data();
    }
    simulation.launch(r, shape.blocks, shape.threads, 0, [e] { exchange<kBug>(e); });
  }
  const Result result = simulation.run();
  return {result, wrong};
}

// Of `seeds` runs, how many went wrong.
template <Bug kBug>
int wrong_runs(int seeds, bool delay_stores) {
  int wrong = 0;
  for (int i = 0; i < seeds; ++i) {
    wrong += !run_exchange<kBug>(config_of(seed() + static_cast<uint64_t>(i), delay_stores), kSmall).right();
  }
  return wrong;
}

void test_all_to_all_is_right_for_every_seed() {
  for (const bool delay_stores : {false, true}) {
    for (uint64_t i = 0; i < 100; ++i) {
      const Outcome outcome = run_exchange<Bug::none>(config_of(seed() + i, delay_stores), kSmall);
      check_equal(outcome.result.error, std::string(), "error");
      check_equal(outcome.wrong, 0u, "wrong vectors");
    }
  }
}

void test_eight_ranks_of_512_threads_take_about_a_second() {
  for (const bool delay_stores : {false, true}) {
    const Outcome outcome = run_exchange<Bug::none>(config_of(seed(), delay_stores), {8, 2, 256, 4096});
    check_equal(outcome.result.error, std::string(), "error");
    check_equal(outcome.wrong, 0u, "wrong vectors");
  }
}

void test_a_relaxed_flag_is_caught_in_weak_mode() {
  check_equal(wrong_runs<Bug::relaxed_flag>(50, false), 0, "wrong runs of 50 in strong mode");
  check(wrong_runs<Bug::relaxed_flag>(50, true) >= 40, "most seeds catch it in weak mode");
}

void test_a_missing_barrier_is_caught() {
  for (const bool delay_stores : {false, true}) {
    check(wrong_runs<Bug::no_barrier_before_flag>(50, delay_stores) >= 40, "none before the flag");
    check(wrong_runs<Bug::no_barrier_after_wait>(50, delay_stores) >= 40, "none after the wait");
  }
}

void test_a_seed_repeats_its_run() {
  const Outcome a = run_exchange<Bug::relaxed_flag>(config_of(seed(), true), kSmall);
  const Outcome b = run_exchange<Bug::relaxed_flag>(config_of(seed(), true), kSmall);
  const Outcome c = run_exchange<Bug::relaxed_flag>(config_of(seed() + 1, true), kSmall);
  check_equal(a.result.switches, b.result.switches, "switches");
  check_equal(a.wrong, b.wrong, "wrong vectors");
  check(a.result.switches != c.result.switches, "another seed is another run");
}

// -- progress and time
// ----------------------------------------------------------------------------------------------

void test_blocks_that_cannot_all_be_resident_are_a_deadlock() {
  Config config = config_of(seed(), false);
  config.sms = 6;
  check_equal(run_exchange<Bug::none>(config, kSmall).result.error, std::string(), "all resident");
  config.sms = 2;  // each block waits for one of each of three ranks
  const Result result = run_exchange<Bug::none>(config, kSmall).result;
  check_contains(result.error, "deadlock", "error");
  check_contains(result.error, "blocks have not started; 2 of at most 2 are resident", "error");
  check_contains(result.error, "at __syncthreads no. 2", "error");
  check_contains(result.error, "seed " + std::to_string(seed()), "error");
}

void test_more_blocks_than_fit_run_one_after_another() {
  Config config = config_of(seed(), true);
  config.sms = 2;
  uint32_t blocks = 0;
  Simulation simulation(config);
  simulation.launch(0, 9, 32, 0, [&blocks] {
    if (threadIdx.x == 0) ptx::add_relaxed_gpu(&blocks, 1);
  });
  check(simulation.run().ok(), "no error");
  check_equal(blocks, 9u, "blocks");
}

void test_a_spin_without_nanosleep_is_a_deadlock_too() {
  uint64_t words[2] = {};
  Simulation simulation(config_of(seed(), false));
  simulation.launch(0, 1, 64, 0, [&words] {
    while (ptx::load_acquire_sys(&words[0]) == 0 && ptx::load_acquire_gpu(&words[1]) == 0) {
    }
  });
  check_contains(simulation.run().error, "64 asleep", "error");
}

void test_deadlines_expire_at_once() {
  uint64_t never = 0;
  uint64_t waited = 0;
  Simulation simulation(config_of(seed(), false));
  simulation.launch(0, 1, 32, 0, [&] {
    const uint64_t start = ptx::globaltimer();
    while (ptx::load_acquire_sys(&never) == 0 && ptx::globaltimer() - start < 60'000'000'000)
      ptx::nanosleep(100);
    if (threadIdx.x == 0) waited = ptx::globaltimer() - start;
  });
  const Result result = simulation.run();
  check_equal(result.error, std::string(), "error");
  check(waited >= 60'000'000'000 && waited < 200'000'000'000, "about as long as the deadline");
  check(result.switches < 100'000, "few switches");
}

void test_time_does_not_leap_while_a_thread_works() {
  uint64_t done = 0;
  uint64_t waited = 0;
  Simulation simulation(config_of(seed(), true));
  simulation.launch(0, 1, 1, 0, [&] {
    alignas(16) static std::byte scratch[16];
    for (int i = 0; i < 20'000; ++i) ptx::store_global(scratch, ptx::load_global(scratch));
    ptx::store_release_sys(&done, 1);
  });
  simulation.launch(1, 1, 1, 0, [&] {
    const uint64_t start = ptx::globaltimer();
    while (ptx::load_acquire_sys(&done) == 0) ptx::nanosleep(100);
    waited = ptx::globaltimer() - start;
  });
  check_equal(simulation.run().error, std::string(), "error");
  check(waited < 10'000'000, "less than 10 ms");
}

void test_kernels_of_a_stream_run_in_order_and_streams_side_by_side() {
  for (uint64_t i = 0; i < 20; ++i) {
    alignas(16) ptx::Vec16 v{};
    uint64_t go = 0;
    uint32_t wrong = 0;
    Simulation simulation(config_of(seed() + i, true));
    // The first kernel waits for the other stream; its store, released or not, has landed when the second
    // runs.
    simulation.launch(0, 1, 1, 0, [&] {
      while (ptx::load_acquire_sys(&go) == 0) ptx::nanosleep(100);
      ptx::store_global(&v, {{1, 2, 3, 4}});
    });
    simulation.launch(0, 4, 32, 0, [&] {
      if (!equal(ptx::load_global(&v), {{1, 2, 3, 4}})) ptx::add_relaxed_gpu(&wrong, 1);
    });
    simulation.launch(1, 1, 1, 0, [&] { ptx::store_release_sys(&go, 1); });
    check_equal(simulation.run().error, std::string(), "error");
    check_equal(wrong, 0u, "threads that ran too early");
  }
}

// -- weak mode: which threads know of a store
// --------------------------------------------------------------------------------

void test_a_thread_sees_its_own_delayed_stores_in_order() {
  alignas(16) ptx::Vec16 v{};
  Simulation simulation(config_of(seed(), true));
  uint32_t wrong = 0;
  simulation.launch(0, 1, 1, 0, [&] {
    for (uint32_t i = 1; i < 1000; ++i) {
      ptx::store_global(&v, {{i, i, i, i}});
      if (i % 3 == 0 && ptx::load_global(&v).word[0] != i) ++wrong;
    }
  });
  check(simulation.run().ok(), "no error");
  check_equal(wrong, 0u, "old values seen");
  check_equal(v.word[3], 999u, "the last one");
}

// Lanes store; then, after `Meet`, lane 0 raises a flag for all of them; the other block reads.
template <class Meet>
int runs_that_miss_a_store(const Meet& meet) {
  int missed = 0;
  for (uint64_t i = 0; i < 50; ++i) {
    std::vector<ptx::Vec16> v(64);
    uint64_t flag = 0;
    uint32_t wrong = 0;
    Simulation simulation(config_of(seed() + i, true));
    simulation.launch(0, 1, 64, 0, [&] {
      ptx::store_global(&v[threadIdx.x], {{1, 1, 1, 1}});
      meet();
      if (threadIdx.x == 0) ptx::store_release_sys(&flag, 1);
      while (ptx::load_acquire_sys(&flag) != 2) ptx::nanosleep(100);  // releases nothing
    });
    simulation.launch(1, 1, 32, 0, [&] {
      while (ptx::load_acquire_sys(&flag) == 0) ptx::nanosleep(100);
      if (ptx::load_global(&v[threadIdx.x]).word[0] != 1) ptx::add_relaxed_gpu(&wrong, 1);
      __syncwarp();
      if (threadIdx.x == 0) ptx::store_release_sys(&flag, 2);
    });
    check_equal(simulation.run().error, std::string(), "error");
    missed += wrong != 0;
  }
  return missed;
}

void test_syncwarp_orders_stores_and_shuffles_do_not() {
  check_equal(runs_that_miss_a_store([] { __syncwarp(); }), 0,
              "runs of 50 that miss a store after __syncwarp");
  check_equal(runs_that_miss_a_store([] { __syncthreads(); }), 0, "the same after __syncthreads");
  // Half warps meet, then one lane of each half: a lane passes on what it knows.
  check_equal(runs_that_miss_a_store([] {
                __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000);
                if (threadIdx.x % 16 == 0) __syncwarp(0x00010001);
              }),
              0, "the same after three partial ones");
  check(runs_that_miss_a_store([] { __ballot_sync(0xffffffff, 1); }) >= 25, "a ballot does not order memory");
  check(runs_that_miss_a_store([] { __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000); }) >= 25,
        "half a warp does not know what the other half stored");
}

void test_a_barrier_that_votes_tells_all_whether_all_agreed() {
  std::vector<uint32_t> wrong(64);
  Simulation simulation(config_of(seed(), false));
  simulation.launch(0, 1, 64, 0, [&] {
    const unsigned me = threadIdx.x;
    for (unsigned no = 0; no < 100; ++no) {  // the one thread that votes against, or none of 64
      const bool agreed = __syncthreads_and(me != no) != 0;
      if (agreed != (no >= 64)) ++wrong[me];
      if (no % 3 == 0) __syncthreads();  // asks nothing, and leaves nothing behind
    }
  });
  check(simulation.run().ok(), "no error");
  check(wrong == std::vector<uint32_t>(64), "every thread's answers");
}

const Suite suite({
    {"a_barrier_that_votes_tells_all_whether_all_agreed",
     test_a_barrier_that_votes_tells_all_whether_all_agreed},
    {"all_to_all_is_right_for_every_seed", test_all_to_all_is_right_for_every_seed},
    {"eight_ranks_of_512_threads_take_about_a_second", test_eight_ranks_of_512_threads_take_about_a_second},
    {"a_relaxed_flag_is_caught_in_weak_mode", test_a_relaxed_flag_is_caught_in_weak_mode},
    {"a_missing_barrier_is_caught", test_a_missing_barrier_is_caught},
    {"a_seed_repeats_its_run", test_a_seed_repeats_its_run},
    {"blocks_that_cannot_all_be_resident_are_a_deadlock",
     test_blocks_that_cannot_all_be_resident_are_a_deadlock},
    {"more_blocks_than_fit_run_one_after_another", test_more_blocks_than_fit_run_one_after_another},
    {"a_spin_without_nanosleep_is_a_deadlock_too", test_a_spin_without_nanosleep_is_a_deadlock_too},
    {"deadlines_expire_at_once", test_deadlines_expire_at_once},
    {"time_does_not_leap_while_a_thread_works", test_time_does_not_leap_while_a_thread_works},
    {"kernels_of_a_stream_run_in_order_and_streams_side_by_side",
     test_kernels_of_a_stream_run_in_order_and_streams_side_by_side},
    {"a_thread_sees_its_own_delayed_stores_in_order", test_a_thread_sees_its_own_delayed_stores_in_order},
    {"syncwarp_orders_stores_and_shuffles_do_not", test_syncwarp_orders_stores_and_shuffles_do_not},
});

}  // namespace
}  // namespace commlib::testing
