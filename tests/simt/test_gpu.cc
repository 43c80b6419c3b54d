// A GPU that runs while threads of the host use it.
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "cpp/suite.h"
#include "cuda/ptx.cuh"
#include "simt/gpu.h"

namespace commlib::testing {
namespace {

using simt::Config;
using simt::Gpu;

Config config_of(uint64_t i, bool delay_stores = false) {
  Config config;
  config.seed = seed() + i;
  config.delay_stores = delay_stores;
  return config;
}

uint64_t load(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
void store(uint64_t* word, uint64_t v) { __atomic_store_n(word, v, __ATOMIC_RELEASE); }

void kernels_run_while_others_are_launched() {
  constexpr int kThreads = 3, kKernels = 10;
  for (const bool delay_stores : {false, true}) {
    std::vector<uint64_t> counts(kThreads);
    Gpu gpu(config_of(0, delay_stores));
    std::vector<std::thread> threads;
    for (int stream = 0; stream < kThreads; ++stream) {
      threads.emplace_back([&, stream] {
        uint64_t* count = &counts[static_cast<size_t>(stream)];
        for (uint64_t i = 1; i <= kKernels; ++i) {
          gpu.launch(stream, 2, 64, 0, [=] { simt::add_release(count, 1); });
          if (i % 2 == 0) continue;
          gpu.synchronize(stream);
          check_equal(load(count), i * 128, "threads that have run");
        }
      });
    }
    for (std::thread& t : threads) t.join();
    gpu.synchronize();
    for (int stream = 0; stream < kThreads; ++stream) check(gpu.idle(stream), "all kernels have ended");
    check_equal(gpu.error(), std::string(), "error");
  }
}

// A kernel asks, the host answers, the kernel ends.
void host_and_kernel_may_wait_for_each_other() {
  for (const bool delay_stores : {false, true}) {
    uint64_t words[2] = {0, 0};
    Gpu gpu(config_of(1, delay_stores));
    auto* seen = static_cast<uint64_t*>(gpu.map(words, sizeof(words)));
    gpu.launch(
        0, 1, 32, 0,
        [=] {
          if (threadIdx.x == 0) ptx::store_release_sys(&seen[0], 1);
          while (ptx::load_acquire_sys(&seen[1]) == 0) ptx::nanosleep(100);
        },
        seen);
    while (load(&words[0]) == 0) std::this_thread::yield();
    check(!gpu.idle(0), "it waits");
    store(&words[1], 1);
    gpu.synchronize(0);
    check_equal(gpu.error(), std::string(), "error");
    gpu.unmap(words);
  }
}

// One thread, because about every 256th look at the time finds it up to 10 ms later: those of a warp in 100
// ms add up to half the deadline now and then, more often on a busy machine.
void deadlines_take_their_time() {
  uint64_t never = 0;
  Gpu gpu(config_of(2));
  const auto start = std::chrono::steady_clock::now();
  gpu.launch(0, 1, 1, 0, [&never] {
    const uint64_t begin = ptx::globaltimer();
    while (ptx::load_acquire_sys(&never) == 0 && ptx::globaltimer() - begin < 100'000'000)
      ptx::nanosleep(100);
  });
  gpu.synchronize(0);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  check(took.count() >= 0.05, "not long before the deadline");
  check(took.count() < 5, "and soon after it");
}

// Lanes write ordinary words of mapped memory; lane 0 notifies the host. In how many of 50 runs it missed
// one.
template <class Meet>
int runs_in_which_the_host_misses_a_word(bool delay_stores, const Meet& meet) {
  int missed = 0;
  for (uint64_t i = 0; i < 50; ++i) {
    struct {
      uint64_t flag;
      uint32_t values[32];
    } words{};
    Gpu gpu(config_of(i, delay_stores));
    auto* seen = static_cast<decltype(words)*>(gpu.map(&words, sizeof(words)));
    gpu.launch(
        0, 1, 32, 0,
        [=] {
          seen->values[threadIdx.x] = threadIdx.x + 1;
          meet();
          if (threadIdx.x == 0) ptx::store_release_sys(&seen->flag, 1);
          while (ptx::load_acquire_sys(&seen->flag) != 2) ptx::nanosleep(100);  // releases nothing
        },
        seen);
    while (load(&words.flag) == 0) std::this_thread::yield();
    bool all = true;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      all &= __atomic_load_n(&words.values[lane], __ATOMIC_RELAXED) == lane + 1;
    }
    missed += !all;
    store(&words.flag, 2);
    gpu.synchronize(0);
    check_equal(gpu.error(), std::string(), "error");
    for (uint32_t lane = 0; lane < 32; ++lane) check_equal(words.values[lane], lane + 1, "when it has ended");
    gpu.unmap(&words);
  }
  return missed;
}

void the_host_misses_unreleased_stores_in_weak_mode() {
  const auto vote = [] { __ballot_sync(0xffffffff, 1); };
  const auto barrier = [] { __syncwarp(); };
  check_equal(runs_in_which_the_host_misses_a_word(true, barrier), 0, "runs of 50, with __syncwarp");
  check_equal(runs_in_which_the_host_misses_a_word(false, vote), 0, "runs of 50, in strong mode");
  check(runs_in_which_the_host_misses_a_word(true, vote) >= 25, "a vote does not order memory");
}

void an_error_ends_all_waits() {
  uint64_t never = 0;
  Gpu gpu(config_of(3));
  gpu.launch(0, 1, 32, 0, [&never] {
    while (ptx::load_acquire_sys(&never) == 0) ptx::nanosleep(100);
  });
  gpu.launch(1, 1, 32, 0, [] {
    if (threadIdx.x > 0) __syncwarp();
  });
  gpu.synchronize(0);
  gpu.synchronize();
  check(!gpu.idle(0), "it has not ended");
  check_contains(gpu.error(), "stream 1 block 0 thread", "error");
}

void a_gpu_may_be_switched_off_at_any_time() {
  for (uint64_t i = 0; i < 10; ++i) {
    uint64_t never = 0;
    Gpu gpu(config_of(i, true));
    gpu.launch(0, 2, 64, 0, [&never] {
      while (ptx::load_acquire_sys(&never) == 0) ptx::nanosleep(100);
    });
    std::this_thread::sleep_for(std::chrono::microseconds(i * 200));
  }
}

const Suite suite({
    {"kernels_run_while_others_are_launched", kernels_run_while_others_are_launched},
    {"host_and_kernel_may_wait_for_each_other", host_and_kernel_may_wait_for_each_other},
    {"deadlines_take_their_time", deadlines_take_their_time},
    {"the_host_misses_unreleased_stores_in_weak_mode", the_host_misses_unreleased_stores_in_weak_mode},
    {"an_error_ends_all_waits", an_error_ends_all_waits},
    {"a_gpu_may_be_switched_off_at_any_time", a_gpu_may_be_switched_off_at_any_time},
});

}  // namespace
}  // namespace commlib::testing
