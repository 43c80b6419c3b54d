// Rows through shared memory, by the copy engine where there is one; and the errors that it catches.
#include <functional>
#include <string>
#include <vector>

#include "cpp/suite.h"
#include "cuda/ptx.cuh"
#include "simt/simt.h"

namespace commlib::testing {
namespace {

using simt::Config;
using simt::Simulation;

enum class Bug { none, no_wait_for_load, no_wait_read, no_wait_written };

constexpr unsigned kWarps = 2;
constexpr unsigned kVectors = 20;  // of a row
constexpr uint32_t kRowBytes = kVectors * sizeof(ptx::Vec16);
constexpr int kStages = 4;
constexpr int kAhead = 2;  // rows whose loads are under way
constexpr size_t kBarrierBytes = 128;
constexpr size_t kWarpBytes = 1408;  // barriers and stages, a multiple of 128
static_assert(kBarrierBytes + kStages * kRowBytes <= kWarpBytes);

struct CopyRows {
  const ptx::Vec16* from;
  ptx::Vec16* to;
  int rows;
  uint64_t* done;  // grows by one with each block, when its rows are written
};

// The warp's part of shared memory: a ring of rows, and for each row the barrier that counts its load.
struct Ring {
  uint64_t* loaded;
  std::byte* stages;

  std::byte* stage(int i) const { return stages + i % kStages * kRowBytes; }
};

template <Bug kBug>
void copy_with_engine(const CopyRows& c, const Ring& ring, int first, int step) {
  const auto row = [&](int i) { return static_cast<size_t>(first + i * step) * kVectors; };
  const int count = c.rows > first ? (c.rows - first + step - 1) / step : 0;
  const auto load = [&](int i) {
    ptx::mbarrier_expect(ring.loaded + i % kStages, kRowBytes);
    ptx::bulk_load(ring.stage(i), c.from + row(i), kRowBytes, ring.loaded + i % kStages);
  };
  for (int i = 0; i < kAhead && i < count; ++i) load(i);
  for (int i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      // The stage held row i + kAhead - kStages: of the stores begun since, only that of row i - 1 may lag.
      if (kBug != Bug::no_wait_read) ptx::bulk_wait_read<1>();
      load(i + kAhead);
    }
    if (kBug != Bug::no_wait_for_load) {
      while (!ptx::mbarrier_try_wait(ring.loaded + i % kStages, i / kStages & 1)) {
      }
    }
    ptx::bulk_store(c.to + row(i), ring.stage(i), kRowBytes);
    ptx::bulk_commit();
  }
  if (kBug == Bug::no_wait_written) {
    ptx::bulk_wait_read<0>();
  } else {
    ptx::bulk_wait_written();
  }
}

template <Bug kBug>
__global__ void copy_rows(const CopyRows c) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto first = static_cast<int>(blockIdx.x * kWarps + warp),
             step = static_cast<int>(gridDim.x * kWarps);
  if constexpr (ptx::kHasBulkCopies) {
    std::byte* mine = ptx::dynamic_shared() + warp * kWarpBytes;
    const Ring ring{reinterpret_cast<uint64_t*>(mine), mine + kBarrierBytes};
    if (lane == 0) {
      for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(ring.loaded + i);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
    if (lane == 0) copy_with_engine<kBug>(c, ring, first, step);
  } else {
    for (int r = first; r < c.rows; r += step) {
      for (size_t i = lane; i < kVectors; i += 32) {
        const size_t at = static_cast<size_t>(r) * kVectors + i;
        ptx::store_global(c.to + at, ptx::load_global(c.from + at));
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) simt::add_release(c.done, 1);
  while (ptx::load_acquire_sys(c.done) != 1000) ptx::nanosleep(200);  // until the reader has checked
}

std::string run_copy_rows(void (*kernel)(CopyRows), const Config& config) {
  constexpr unsigned kBlocks = 2;
  constexpr int kRows = 40;
  std::vector<ptx::Vec16> from(kRows * kVectors), to(kRows * kVectors);
  for (size_t i = 0; i < from.size(); ++i) from[i] = {{static_cast<uint32_t>(i + 1), 2, 3, 4}};
  uint64_t done = 0;
  int wrong = 0;
  const CopyRows c{from.data(), to.data(), kRows, &done};
  Simulation simulation(config);
  simulation.launch(0, kBlocks, kWarps * 32, ptx::kHasBulkCopies ? kWarps * kWarpBytes : 0,
                    [=] { kernel(c); });
  simulation.launch(1, 1, 1, 0, [&] {
    while (ptx::load_acquire_sys(&done) != kBlocks) ptx::nanosleep(200);
    for (size_t i = 0; i < to.size(); ++i) wrong += ptx::load_global(&to[i]).word[0] != from[i].word[0];
    ptx::store_release_sys(&done, 1000);
  });
  const simt::Result result = simulation.run();
  if (!result.ok()) return result.error;
  return wrong == 0 ? "" : "wrong rows";
}

int wrong_runs(void (*kernel)(CopyRows), int seeds) {
  int wrong = 0;
  for (int i = 0; i < seeds; ++i) {
    Config config;
    config.seed = seed() + static_cast<uint64_t>(i);
    wrong += !run_copy_rows(kernel, config).empty();
  }
  return wrong;
}

void test_rows_through_shared_memory_are_right_for_every_seed() {
  for (uint64_t i = 0; i < 100; ++i) {
    Config config;
    config.seed = seed() + i;
    config.delay_stores = i % 2 == 0;
    check_equal(run_copy_rows(copy_rows<Bug::none>, config), std::string(), "error");
  }
}

// One block of one warp runs `kernel`, with `shared_bytes` of shared memory; returns the error.
std::string error_of(const std::function<void()>& kernel, size_t shared_bytes = 256,
                     bool delay_stores = false, uint64_t seed_of_run = seed()) {
  Config config;
  config.seed = seed_of_run;
  config.delay_stores = delay_stores;
  Simulation simulation(config);
  simulation.launch(0, 1, 32, shared_bytes, kernel);
  return simulation.run().error;
}

#ifndef COMMLIB_SIMT_NO_BULK

void test_a_missing_wait_for_copies_is_caught() {
  check(wrong_runs(copy_rows<Bug::no_wait_for_load>, 50) >= 40, "rows that have not come");
  check(wrong_runs(copy_rows<Bug::no_wait_read>, 50) >= 40, "rows overwritten before they were stored");
  check(wrong_runs(copy_rows<Bug::no_wait_written>, 50) >= 10, "rows released before they were written");
}

alignas(128) std::byte global_bytes[256];

struct Shared {
  uint64_t* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  std::byte* data = ptx::dynamic_shared() + 128;
};

// The lone thread of a kernel with a barrier that is ready.
template <class Body>
std::string error_of_one(const Body& body, size_t shared_bytes = 256, bool delay_stores = false,
                         uint64_t seed_of_run = seed()) {
  return error_of(
      [&body] {
        if (threadIdx.x != 0) return;
        const Shared s;
        ptx::mbarrier_init(s.barrier);
        ptx::fence_mbarrier_init();
        body(s);
      },
      shared_bytes, delay_stores, seed_of_run);
}

void await(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

void load(const Shared& s, uint32_t bytes) {
  ptx::mbarrier_expect(s.barrier, bytes);
  ptx::bulk_load(s.data, global_bytes, bytes, s.barrier);
}

void test_copies_out_of_line_or_bounds_are_reported() {
  const auto error = [](auto body) { return error_of_one(body); };
  check_contains(error([](Shared s) { ptx::bulk_load(s.data + 8, global_bytes, 16, s.barrier); }),
                 "is not a multiple of 16", "shared address");
  check_contains(error([](Shared s) { ptx::bulk_load(s.data, global_bytes + 4, 16, s.barrier); }),
                 "is not a multiple of 16", "global address");
  check_contains(error([](Shared s) { ptx::bulk_store(global_bytes, s.data, 24); }),
                 "bulk_store: 24 bytes are not a multiple of 16", "size");
  check_contains(error([](Shared s) { ptx::bulk_store(global_bytes, s.data, 144); }),
                 "are not in the block's shared memory", "shared range");
  check_contains(error([](Shared s) { ptx::bulk_store(s.data, s.data, 16); }), "is shared memory",
                 "global address");
  const std::vector<ptx::Vec16> small(7);
  check_contains(error([&](Shared s) { ptx::bulk_load(s.data, small.data(), 128, s.barrier); }),
                 "is not allocated", "global range");
}

void test_misused_mbarriers_are_reported() {
  const auto error = [](auto body) { return error_of_one(body); };
  check_contains(error([](Shared s) { ptx::mbarrier_expect(s.barrier + 1, 16); }), "no mbarrier at",
                 "garbage");
  check_contains(error([](Shared s) { ptx::mbarrier_try_wait(s.barrier, 2); }), "parity 2", "parity");
  check_contains(error([](Shared s) {
                   ptx::mbarrier_expect(s.barrier, 16);
                   ptx::mbarrier_expect(s.barrier, 16);
                 }),
                 "the second one in a phase", "two arrivals");
  check_contains(error([](Shared s) {
                   ptx::mbarrier_init(s.barrier + 1);
                   ptx::bulk_load(s.data, global_bytes, 16, s.barrier + 1);
                 }),
                 "no fence_mbarrier_init", "unfenced");
  // 16 more bytes are expected than come, or a phase is awaited in which nothing is loaded.
  check_contains(error([](Shared s) {
                   ptx::mbarrier_expect(s.barrier, 32);
                   ptx::bulk_load(s.data, global_bytes, 16, s.barrier);
                   await(s.barrier, 0);
                 }),
                 "deadlock", "too few bytes");
  check_contains(error([](Shared s) {
                   load(s, 16);
                   await(s.barrier, 0);
                   await(s.barrier, 1);
                 }),
                 "deadlock", "wrong parity");
}

void test_a_phase_needs_arrival_and_bytes_in_any_order() {
  check_equal(error_of_one([](Shared s) {
                check(ptx::mbarrier_try_wait(s.barrier, 1), "the phase before the first has ended");
                for (uint32_t i = 0; i < 10; ++i) {
                  ptx::bulk_load(s.data, global_bytes, 64, s.barrier);
                  ptx::bulk_load(s.data + 64, global_bytes + 64, 64, s.barrier);
                  ptx::mbarrier_expect(s.barrier, 128);
                  await(s.barrier, i & 1);
                }
              }),
              std::string(), "error");
}

void test_copies_that_outlive_their_block_are_reported() {
  const auto store = [](Shared s, auto after) {
    load(s, 64);
    await(s.barrier, 0);
    ptx::bulk_store(global_bytes + 128, s.data, 64);
    after();
  };
  const auto error = [&](auto after) { return error_of_one([&](Shared s) { store(s, after); }); };
  check_contains(error([] {}), "block ended with copies under way: no wait for 1 uncommitted", "no commit");
  check_contains(error([] { ptx::bulk_commit(); }), "no wait for 1 committed", "no wait");
  check_contains(error([] { ptx::bulk_wait_written(); }), "no wait for 1 uncommitted",
                 "wait without a commit");
  check_contains(error([] {
                   ptx::bulk_commit();
                   ptx::bulk_wait_read<1>();
                 }),
                 "no wait for 1 committed", "wait for older ones");
  check_equal(error([] {
                ptx::bulk_commit();
                ptx::bulk_commit();
                ptx::bulk_wait_read<1>();
              }),
              std::string(), "wait for all but an empty one");
  int reported = 0;
  for (uint64_t i = 0; i < 50; ++i) {
    reported += !error_of_one([](Shared s) { load(s, 64); }, 256, false, seed() + i).empty();
  }
  check(reported >= 10, "a load that nobody awaits");
}

// In weak mode: whether a bulk load may miss what its own thread has just stored.
int runs_that_load_old_bytes(bool fence) {
  int old = 0;
  for (uint64_t i = 0; i < 50; ++i) {
    alignas(16) ptx::Vec16 v{};
    uint32_t seen = 0;
    const std::string error = error_of_one(
        [&](Shared s) {
          ptx::store_global(&v, {{1, 1, 1, 1}});
          if (fence) ptx::fence_proxy_async();
          ptx::mbarrier_expect(s.barrier, 16);
          ptx::bulk_load(s.data, &v, 16, s.barrier);
          await(s.barrier, 0);
          seen = ptx::load_shared(s.data).word[0];
        },
        256, true, seed() + i);
    check_equal(error, std::string(), "error");
    old += seen == 0;
  }
  return old;
}

void test_a_missing_proxy_fence_before_a_load_is_caught_in_weak_mode() {
  check_equal(runs_that_load_old_bytes(true), 0, "runs of 50 that load old bytes with a fence");
  check(runs_that_load_old_bytes(false) >= 5, "some seeds catch it");
}

const Suite with_engine({
    {"a_missing_wait_for_copies_is_caught", test_a_missing_wait_for_copies_is_caught},
    {"copies_out_of_line_or_bounds_are_reported", test_copies_out_of_line_or_bounds_are_reported},
    {"misused_mbarriers_are_reported", test_misused_mbarriers_are_reported},
    {"a_phase_needs_arrival_and_bytes_in_any_order", test_a_phase_needs_arrival_and_bytes_in_any_order},
    {"copies_that_outlive_their_block_are_reported", test_copies_that_outlive_their_block_are_reported},
    {"a_missing_proxy_fence_before_a_load_is_caught_in_weak_mode",
     test_a_missing_proxy_fence_before_a_load_is_caught_in_weak_mode},
});

#else

void test_without_the_engine_its_functions_do_nothing() {
  check_equal(error_of([] {
                ptx::mbarrier_init(nullptr);
                ptx::bulk_store(nullptr, nullptr, 1);
                while (!ptx::mbarrier_try_wait(nullptr, 7)) {
                }
              }),
              std::string(), "error");
  check(wrong_runs(copy_rows<Bug::no_wait_read>, 1) == 0, "the plain path does not wait for copies");
}

const Suite without_engine({
    {"without_the_engine_its_functions_do_nothing", test_without_the_engine_its_functions_do_nothing},
});

#endif

const Suite suite({
    {"rows_through_shared_memory_are_right_for_every_seed",
     test_rows_through_shared_memory_are_right_for_every_seed},
});

}  // namespace
}  // namespace commlib::testing
