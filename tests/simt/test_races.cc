// Races are found in every run, however it went; ordered accesses are none.
#include <functional>
#include <string>

#include "cpp/suite.h"
#include "cuda/ptx.cuh"
#include "simt/simt.h"

namespace commlib::testing {
namespace {

constexpr unsigned kAll = 0xffffffff;

// Memory that kernels share; new for each run.
struct Shared {
  alignas(128) ptx::Vec16 rows[64];
  uint64_t flag;
  uint32_t count;
  uint64_t done;
};

using Kernel = std::function<void(Shared&)>;

// Each kernel on a stream of its own. They end together, because all that ended before a kernel starts is
// ordered.
std::string error_of(const std::vector<Kernel>& kernels, unsigned threads, unsigned blocks,
                     uint64_t seed_of_run) {
  simt::Config config;
  config.seed = seed_of_run;
  config.find_races = true;
  config.delay_stores = seed_of_run % 2 == 0;
  Shared shared{};
  simt::Simulation simulation(config);
  for (size_t i = 0; i < kernels.size(); ++i) {
    simulation.launch(static_cast<int>(i), blocks, threads, 4096, [&, i] {
      kernels[i](shared);
      simt::add_release(&shared.done, 1);
      while (ptx::load_acquire_sys(&shared.done) < kernels.size() * blocks * threads) ptx::nanosleep(100);
    });
  }
  return simulation.run().error;
}

void check_race(const char* what, const std::vector<Kernel>& kernels, unsigned threads = 32,
                unsigned blocks = 1) {
  for (uint64_t i = 0; i < 10; ++i)
    check_contains(error_of(kernels, threads, blocks, seed() + i), "race on", what);
}

void check_no_race(const char* what, const std::vector<Kernel>& kernels, unsigned threads = 32,
                   unsigned blocks = 1) {
  for (uint64_t i = 0; i < 10; ++i) {
    check_equal(error_of(kernels, threads, blocks, seed() + i), std::string(), what);
  }
}

unsigned lane() { return threadIdx.x % 32; }
void put(Shared& s, unsigned i) { ptx::store_global(&s.rows[i], {{i, i, i, i}}); }
void get(const Shared& s, unsigned i) { ptx::load_global(&s.rows[i]); }
void raise(Shared& s) { ptx::store_release_sys(&s.flag, 1); }
void await(Shared& s, uint64_t value = 1) {
  while (ptx::load_acquire_sys(&s.flag) != value) ptx::nanosleep(100);
}

void barriers_order_accesses_and_votes_do_not() {
  const auto neighbour_reads = [](auto meet) -> Kernel {
    return [=](Shared& s) {
      put(s, threadIdx.x);
      meet();
      get(s, threadIdx.x ^ 1);
    };
  };
  const auto neighbour_writes = [](auto meet) -> Kernel {
    return [=](Shared& s) {
      get(s, threadIdx.x);
      meet();
      put(s, threadIdx.x ^ 1);
    };
  };
  const auto vote = [] { __all_sync(kAll, 1); };
  const auto shuffle = [] { __shfl_sync(kAll, 1, 0); };
  const auto warp = [] { __syncwarp(); };
  const auto block = [] { __syncthreads(); };
  check_no_race("__syncwarp", {neighbour_reads(warp)});
  check_no_race("__syncwarp before a write", {neighbour_writes(warp)});
  check_no_race("__syncthreads", {neighbour_reads(block)}, 64);
  check_race("a vote", {neighbour_reads(vote)});
  check_race("a shuffle", {neighbour_reads(shuffle)});
  check_race("a vote before a write", {neighbour_writes(vote)});
  check_race("__syncwarp, for another warp", {[](Shared& s) {
               put(s, threadIdx.x);
               __syncwarp();
               get(s, threadIdx.x ^ 32);
             }},
             64);
}

void releases_order_what_acquirers_do() {
  const Kernel sends = [](Shared& s) {
    put(s, lane());
    __syncwarp();
    if (lane() == 0) raise(s);
  };
  const auto receives = [](auto meet) -> Kernel {
    return [=](Shared& s) {
      if (lane() == 3) await(s);
      meet();
      get(s, lane());
    };
  };
  const auto warp = [] { __syncwarp(); };
  const auto vote = [] { __all_sync(kAll, 1); };
  check_no_race("release and acquire", {sends, receives(warp)});
  check_race("others than the acquirer", {sends, receives(vote)});
  check_race("stores of other lanes", {[](Shared& s) {
                                         put(s, lane());
                                         __all_sync(kAll, 1);
                                         if (lane() == 0) raise(s);
                                       },
                                       receives(warp)});
  check_race("a relaxed flag", {[](Shared& s) {
                                  put(s, lane());
                                  __syncwarp();
                                  if (lane() == 0) simt::store_relaxed(&s.flag, 1);
                                },
                                receives(warp)});
  check_race("a row written again too early", {[=](Shared& s) {
                                                 sends(s);
                                                 if (lane() == 0) put(s, 0);
                                               },
                                               receives(warp)});
}

void additions_pass_on_what_all_adders_know() {
  const Kernel adds = [](Shared& s) {
    put(s, threadIdx.x);
    simt::add_release(&s.flag, 1);
  };
  check_no_race("a counter", {adds, [](Shared& s) {
                                await(s, 32);
                                get(s, 31 - lane());
                              }});
  const auto grid = [](bool acquires) -> Kernel {
    return [=](Shared& s) {
      put(s, blockIdx.x);
      if (acquires) {
        if (ptx::add_acq_rel_gpu(&s.flag, 1) == 1) get(s, 1 - blockIdx.x);
      } else {
        simt::add_release(&s.flag, 1);
        get(s, 1 - blockIdx.x);
      }
    };
  };
  check_no_race("who adds last knows all", {grid(true)}, 1, 2);
  check_race("a release does not acquire", {grid(false)}, 1, 2);
}

void relaxed_atomics_race_only_with_ordinary_accesses() {
  check_no_race("additions", {[](Shared& s) { ptx::add_relaxed_gpu(&s.count, 1); }}, 64);
  check_race("additions and a store", {[](Shared& s) {
               if (threadIdx.x > 0) ptx::add_relaxed_gpu(&s.count, 1);
               if (threadIdx.x == 0) ptx::store_global(&s.flag, {{1, 1, 1, 1}});  // count is beside it
             }});
}

void what_the_host_may_have_waited_for_is_over() {
  simt::Config config;
  config.seed = seed();
  config.find_races = true;
  Shared shared{};
  simt::Simulation simulation(config);
  const auto body = [&shared] { put(shared, threadIdx.x); };
  simulation.launch(0, 2, 1, 0, [&shared] { put(shared, blockIdx.x); });
  simulation.launch(0, 1, 32, 0, body);
  check_equal(simulation.run().error, std::string(), "kernels of one stream");
  simulation.launch(1, 1, 32, 0, body);
  check_equal(simulation.run().error, std::string(), "a later one of another stream");
  const Kernel same = [](Shared& s) { put(s, threadIdx.x); };
  check_race("kernels of two streams side by side", {same, same});
}

#ifndef COMMLIB_SIMT_NO_BULK

std::byte* slot(unsigned i) { return ptx::dynamic_shared() + 128 + i * 64; }
uint64_t* barrier(unsigned i) { return reinterpret_cast<uint64_t*>(ptx::dynamic_shared()) + i; }

void begin() {
  if (lane() < 4) ptx::mbarrier_init(barrier(lane()));
  ptx::fence_mbarrier_init();
  __syncwarp();
}
void load(Shared& s, unsigned into, unsigned row) {
  ptx::mbarrier_expect(barrier(into), 64);
  ptx::bulk_load(slot(into), &s.rows[row], 64, barrier(into));
}
void await_load(unsigned i, uint32_t parity = 0) {
  while (!ptx::mbarrier_try_wait(barrier(i), parity)) {
  }
}

void copies_are_over_when_they_are_waited_for() {
  const auto lane_0 = [](auto body) -> Kernel {
    return [=](Shared& s) {
      begin();
      if (lane() == 0) body(s);
    };
  };
  check_no_race("a load, awaited", {lane_0([](Shared& s) {
                  load(s, 0, 0);
                  await_load(0);
                  ptx::load_shared(slot(0));
                })});
  check_race("a load read too early", {lane_0([](Shared& s) {
               load(s, 0, 0);
               ptx::load_shared(slot(0));
               await_load(0);
             })});
  check_race("a row changed while it is loaded", {lane_0([](Shared& s) {
               load(s, 0, 0);
               put(s, 1);
               await_load(0);
             })});
  const auto reuses = [&](auto wait) {
    return lane_0([=](Shared& s) {
      load(s, 0, 0);
      await_load(0);
      ptx::bulk_store(&s.rows[8], slot(0), 64);
      ptx::bulk_commit();
      wait();
      load(s, 0, 0);
      await_load(0, 1);
      ptx::bulk_wait_written();
    });
  };
  check_no_race("a slot loaded again", {reuses([] { ptx::bulk_wait_read<0>(); })});
  check_race("a slot loaded again too early", {reuses([] { ptx::bulk_wait_read<1>(); })});
  const auto sends = [&](auto wait) {
    return lane_0([=](Shared& s) {
      load(s, 0, 0);
      await_load(0);
      ptx::bulk_store(&s.rows[8], slot(0), 64);
      ptx::bulk_commit();
      wait();
      raise(s);
      ptx::bulk_wait_written();
    });
  };
  const Kernel receives = [](Shared& s) {
    await(s);
    get(s, 8);
  };
  check_no_race("a row released when it is written", {sends([] { ptx::bulk_wait_written(); }), receives});
  check_race("a row released when it is only read", {sends([] { ptx::bulk_wait_read<0>(); }), receives});
}

// Lane 0 loads for all; a slot is free when all have read it.
void a_warp_shares_what_one_lane_loads() {
  const auto ring = [](auto meet) -> Kernel {
    return [=](Shared& s) {
      begin();
      for (uint32_t i = 0; i < 4; ++i) {
        if (lane() == 0) load(s, 0, 4 * i);
        await_load(0, i & 1);
        ptx::load_shared(slot(0) + lane() % 4 * 16);
        meet();
      }
    };
  };
  check_no_race("with a barrier", {ring([] { __syncwarp(); })});
  check_race("with a vote", {ring([] { __all_sync(kAll, 1); })});
}

// Ordinary stores, then a bulk load: some thread on the way from one to the other must fence.
void the_copy_engine_needs_a_fence() {
  const auto alone = [](bool fence) -> Kernel {
    return [=](Shared& s) {
      begin();
      if (lane() != 0) return;
      put(s, 0);
      if (fence) ptx::fence_proxy_async();
      load(s, 0, 0);
      await_load(0);
    };
  };
  check_no_race("with a fence", {alone(true)});
  check_race("without", {alone(false)});
  const auto sends = [](bool fence) -> Kernel {
    return [=](Shared& s) {
      put(s, lane());
      if (fence) ptx::fence_proxy_async();
      __syncwarp();
      if (lane() == 0) raise(s);
    };
  };
  const auto receives = [](bool fence) -> Kernel {
    return [=](Shared& s) {
      begin();
      if (lane() == 3) await(s);
      __syncwarp();
      if (fence) ptx::fence_proxy_async();
      if (lane() != 0) return;
      load(s, 0, 0);
      await_load(0);
    };
  };
  check_no_race("the sender fences", {sends(true), receives(false)});
  check_no_race("the receiver fences", {sends(false), receives(true)});
  check_race("nobody fences", {sends(false), receives(false)});
}

const Suite with_engine({
    {"copies_are_over_when_they_are_waited_for", copies_are_over_when_they_are_waited_for},
    {"a_warp_shares_what_one_lane_loads", a_warp_shares_what_one_lane_loads},
    {"the_copy_engine_needs_a_fence", the_copy_engine_needs_a_fence},
});

#endif

const Suite suite({
    {"barriers_order_accesses_and_votes_do_not", barriers_order_accesses_and_votes_do_not},
    {"releases_order_what_acquirers_do", releases_order_what_acquirers_do},
    {"additions_pass_on_what_all_adders_know", additions_pass_on_what_all_adders_know},
    {"relaxed_atomics_race_only_with_ordinary_accesses", relaxed_atomics_race_only_with_ordinary_accesses},
    {"what_the_host_may_have_waited_for_is_over", what_the_host_may_have_waited_for_is_over},
});

}  // namespace
}  // namespace commlib::testing
