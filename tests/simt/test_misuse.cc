// Warp collectives and __syncthreads: their results, and that their misuse is reported.
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpp/suite.h"
#include "cuda/ptx.cuh"
#include "simt/simt.h"

namespace commlib::testing {
namespace {

constexpr unsigned kAll = 0xffffffff;

std::string error_of(unsigned threads, const std::function<void()>& kernel, uint64_t more_seed = 0) {
  simt::Config config;
  config.seed = seed() + more_seed;
  simt::Simulation simulation(config);
  simulation.launch(3, 1, threads, 64, kernel);
  return simulation.run().error;
}

// In whatever order threads come, the same misuse is found; the wording depends on which came last.
void check_reported(unsigned threads, const std::function<void()>& kernel,
                    const std::vector<std::string>& one_of) {
  for (uint64_t i = 0; i < 20; ++i) {
    const std::string error = error_of(threads, kernel, i);
    bool known = false;
    for (const std::string& text : one_of) known |= error.find(text) != std::string::npos;
    check(known, ("no '" + one_of[0] + "' in: " + error).c_str());
    check_contains(error, "stream 3 block 0 thread", "error");
  }
}

void test_collectives_return_what_a_gpu_returns() {
  for (uint64_t i = 0; i < 20; ++i) {
    int wrong = 0;
    const std::string error = error_of(
        96,
        [&wrong] {
          const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
          wrong += __ballot_sync(kAll, lane % 3 == 0) != 0x49249249;
          wrong += __shfl_sync(kAll, 1.5f * static_cast<float>(lane + warp), 7) !=
                   1.5f * static_cast<float>(7 + warp);
          wrong += __shfl_sync(kAll, static_cast<int64_t>(lane) << 40, static_cast<int>(31 - lane)) !=
                   static_cast<int64_t>(31 - lane) << 40;
          wrong += __any_sync(kAll, lane == 5) != 1 || __any_sync(kAll, 0) != 0;
          wrong += __all_sync(kAll, lane != 5) != 0 || __all_sync(kAll, 7) != 1;
          wrong += __match_any_sync(kAll, lane % 4) != 0x11111111u << lane % 4;
          // Halves of a warp go their own ways.
          const unsigned half = lane < 16 ? 0x0000ffff : 0xffff0000;
          for (unsigned k = 0; k < 1 + lane / 16; ++k) wrong += __ballot_sync(half, 1) != half;
          wrong += __match_any_sync(kAll, -static_cast<int>(lane / 16)) != half;
        },
        i);
    check_equal(error, std::string(), "error");
    check_equal(wrong, 0, "wrong results");
  }
}

void test_bit_functions_are_those_of_cuda() {
  check_equal(__popc(0xf0f0u), 8, "popc");
  check_equal(__popcll(0xf0f0ull << 32), 8, "popcll");
  check_equal(__ffs(0), 0, "ffs of 0");
  check_equal(__ffs(8), 4, "ffs");
  check_equal(__ffsll(1ll << 40), 41, "ffsll");
  check_equal(__float_as_uint(1.0f), 0x3f800000u, "float bits");
  check_equal(__uint_as_float(0x40000000u), 2.0f, "float of bits");
}

void test_a_short_last_warp_may_name_all_lanes() {
  check_equal(error_of(40, [] { __syncwarp(); }), std::string(), "error");
}

void test_lanes_at_different_collectives_are_reported() {
  check_reported(32, [] { threadIdx.x == 9 ? __syncwarp() : static_cast<void>(__ballot_sync(kAll, 1)); },
                 {"waits at __ballot_sync(0xffffffff)", "lane 9 waits at __syncwarp(0xffffffff)"});
  // Different masks, and each half waits for the other.
  check_reported(32, [] { __syncwarp(threadIdx.x < 16 ? 0x0001ffff : 0xffff8000); },
                 {"__syncwarp(0xffff8000): lane", "__syncwarp(0x1ffff): lane"});
}

void test_a_mask_without_its_caller_is_reported() {
  check_reported(32, [] { __syncwarp(0x0000ffff); }, {"is not in its own mask"});
}

void test_a_shuffle_from_outside_its_mask_is_reported() {
  check_reported(32, [] { threadIdx.x < 4 ? static_cast<void>(__shfl_sync(0xf, 1, 4)) : void(); },
                 {"reads lane 4"});
}

void test_lanes_that_exited_are_reported() {
  check_reported(64, [] { threadIdx.x == 40 ? void() : __syncwarp(); },
                 {"lane 8 has exited", "exited while lane"});
}

void test_a_collective_within_a_barrier_is_reported() {
  check_reported(64, [] { threadIdx.x == 40 ? __syncwarp() : __syncthreads(); },
                 {"waits at __syncthreads", "lane 8 waits at __syncwarp"});
}

void test_a_barrier_that_not_all_threads_reach_is_reported() {
  check_reported(
      64,
      [] {
        __syncthreads();
        if (threadIdx.x != 40) __syncthreads();
      },
      {"__syncthreads: 1 threads of the block have exited", "thread 40: exited after 1 __syncthreads while"});
}

void test_wrong_addresses_are_reported() {
  alignas(16) static std::byte global[32];
  check_contains(error_of(1, [] { ptx::load_global(global + 8); }), "load_global: ", "alignment");
  check_contains(error_of(1, [] { ptx::store_global(ptx::dynamic_shared(), {}); }), "is shared memory",
                 "store");
  check_contains(error_of(1, [] { ptx::load_shared(global); }), "is not in shared memory", "shared load");
  check_contains(error_of(1, [] { ptx::load_shared(ptx::dynamic_shared() + 64); }), "is not in shared memory",
                 "past the end");
}

void test_an_exception_in_a_kernel_is_reported() {
  check_contains(error_of(40,
                          [] {
                            if (threadIdx.x == 33) throw std::runtime_error("a test's own check");
                          }),
                 "stream 3 block 0 thread 33: threw: a test's own check", "error");
}

void test_shared_memory_starts_as_garbage_and_is_each_blocks_own() {
  simt::Config config;
  config.seed = seed();
  simt::Simulation simulation(config);
  std::vector<std::byte*> of_block(4);
  int zeros = 0;
  simulation.launch(0, 4, 32, 1000, [&] {
    __syncthreads();  // all four are resident by then, or at least not the same
    of_block[blockIdx.x] = ptx::dynamic_shared();
    if (threadIdx.x == 0) {
      for (int i = 0; i < 1000; ++i) zeros += of_block[blockIdx.x][i] == std::byte{0};
    }
  });
  check(simulation.run().ok(), "no error");
  check(zeros < 100, "one byte in 256 is zero");
  for (const std::byte* p : of_block) check(reinterpret_cast<uintptr_t>(p) % 128 == 0, "128-byte alignment");
}

void test_launches_that_no_gpu_makes_are_refused() {
  simt::Simulation simulation(simt::Config{});
  check_throws<std::invalid_argument>([&] { simulation.launch(0, 0, 32, 0, [] {}); }, "no blocks");
  check_throws<std::invalid_argument>([&] { simulation.launch(0, 1, 1025, 0, [] {}); }, "too many threads");
  check_throws<std::invalid_argument>([&] { simulation.launch(0, 1, 32, 256 << 10, [] {}); },
                                      "shared memory");
}

const Suite suite({
    {"collectives_return_what_a_gpu_returns", test_collectives_return_what_a_gpu_returns},
    {"bit_functions_are_those_of_cuda", test_bit_functions_are_those_of_cuda},
    {"a_short_last_warp_may_name_all_lanes", test_a_short_last_warp_may_name_all_lanes},
    {"lanes_at_different_collectives_are_reported", test_lanes_at_different_collectives_are_reported},
    {"a_mask_without_its_caller_is_reported", test_a_mask_without_its_caller_is_reported},
    {"a_shuffle_from_outside_its_mask_is_reported", test_a_shuffle_from_outside_its_mask_is_reported},
    {"lanes_that_exited_are_reported", test_lanes_that_exited_are_reported},
    {"a_collective_within_a_barrier_is_reported", test_a_collective_within_a_barrier_is_reported},
    {"a_barrier_that_not_all_threads_reach_is_reported",
     test_a_barrier_that_not_all_threads_reach_is_reported},
    {"wrong_addresses_are_reported", test_wrong_addresses_are_reported},
    {"an_exception_in_a_kernel_is_reported", test_an_exception_in_a_kernel_is_reported},
    {"shared_memory_starts_as_garbage_and_is_each_blocks_own",
     test_shared_memory_starts_as_garbage_and_is_each_blocks_own},
    {"launches_that_no_gpu_makes_are_refused", test_launches_that_no_gpu_makes_are_refused},
});

}  // namespace
}  // namespace commlib::testing
