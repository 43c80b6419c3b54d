// Arrival tags: the last worker of an operation speaks for all, and no tag is taken for that of another
// operation.
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "../suite.h"
#include "cpu/pool.h"
#include "cpu/worker.h"
#include "protocol/combine.h"

namespace commlib::testing {
namespace {

// Two ranks in this process, of which rank 1 sends to rank 0.
class Pair {
 public:
  explicit Pair(uint64_t first_epoch) : blocks_(2, std::vector<Signals>(2)) {
    table.size = 2;
    table.rank = 1;
    table.near = table.all();
    for (int p = 0; p < 2; ++p) {
      table.peer[p].signals = blocks_[p].data();
      for (Signals& s : blocks_[p]) std::fill(s.arrived, s.arrived + kWaves, first_epoch - 1);
    }
  }

  bool seen(int wave, uint64_t epoch) const { return load_word(&blocks_[0][1].arrived[wave]) >= epoch; }

  PeerTable table{};

 private:
  std::vector<std::vector<Signals>> blocks_;  // by owner, then by source
};

std::unique_ptr<OpContext> context_of(const Pair& pair) {
  auto op = std::make_unique<OpContext>();
  op->peers = &pair.table;
  op->ops = &vector_ops("");
  return op;
}

// Plain memory, which ThreadSanitizer sees: only the tag orders what each worker wrote.
void who_sees_the_tag_sees_what_every_worker_has_written() {
  for (int workers = 1; workers <= 4; ++workers) {
    Pair pair(1);
    WorkerPool pool(workers, {}, nullptr);
    std::vector<uint32_t> written(workers, 0);
    for (uint32_t epoch = 1; epoch <= 200; ++epoch) {
      auto op = context_of(pair);
      auto job = std::make_shared<Job>();
      job->run = [&](int i) {
        CpuWorker w(*op, i, workers);
        written[i] = epoch;
        arrive(w, pair.table, epoch);
        while (!pair.seen(kLastWave, epoch)) sched_yield();
        for (const uint32_t by_worker : written) check_equal(by_worker, epoch, "what a worker wrote");
      };
      job->finish = [] {};
      pool.run(job);
      for (const uint64_t n : op->counters) check_equal(n, uint64_t{0}, "a counter after its operation");
    }
  }
}

// Operations of another number of workers each, past the end of 32 bits: one worker is missing, then none.
void rows_have_arrived_once_the_last_worker_has_come_and_not_before() {
  for (const uint64_t first : {uint64_t{1}, (uint64_t{1} << 32) - 3, uint64_t{1} << 33}) {
    Pair pair(first);
    for (uint32_t i = 0; i < 8; ++i) {
      const uint64_t epoch = first + i;
      const int workers = 1 + static_cast<int>(i * 5 % 4);
      auto op = context_of(pair);
      for (int w = 0; w < workers; ++w) {
        check(!pair.seen(kLastWave, epoch), "a worker is missing");
        CpuWorker worker(*op, w, workers);
        arrive(worker, pair.table, epoch);
      }
      check(pair.seen(kLastWave, epoch), "all workers have come");
      check(!pair.seen(kLastWave, epoch + 1), "the next operation has not begun");
    }
    check(pair.seen(kLastWave, first), "a source that is ahead is not taken for one that is late");
  }
}

// Where counts of several waves were added up, a worker two waves ahead could stand in for one that is
// behind.
void a_worker_two_waves_ahead_does_not_stand_in_for_one_that_is_behind() {
  Pair pair(7);
  auto op = context_of(pair);
  CpuWorker ahead(*op, 0, 2), behind(*op, 1, 2);
  for (int wave = 0; wave < kWaves; ++wave) arrive_in_wave(ahead, pair.table, wave, 7);
  for (int wave = 0; wave < kWaves; ++wave) {
    check(!pair.seen(wave, 7), "only one of two workers has sent the wave");
    arrive_in_wave(behind, pair.table, wave, 7);
    check(pair.seen(wave, 7), "both have");
  }
}

void a_worker_that_failed_is_not_spoken_for() {
  Pair pair(1);
  auto op = context_of(pair);
  CpuWorker well(*op, 0, 2), failed(*op, 1, 2);
  finish_pull(well, pair.table, 1, true);
  finish_pull(failed, pair.table, 1, false);
  check_equal(load_word(&pair.table.peer[0].signals[1].pulled), uint64_t{0}, "operations pulled");
  auto again = context_of(pair);
  for (int i = 0; i < 2; ++i) {
    CpuWorker w(*again, i, 2);
    finish_pull(w, pair.table, 1, true);
  }
  check_equal(load_word(&pair.table.peer[0].signals[1].pulled), uint64_t{1}, "operations pulled");
}

// However many operations without waves lie between two in waves.
void waves_of_long_ago_are_not_taken_for_those_of_now() {
  for (const int bits : {20, 31, 32, 40}) {
    Pair pair(1);
    auto then = context_of(pair);
    CpuWorker w(*then, 0, 1);
    for (int wave = 0; wave < kWaves; ++wave) arrive_in_wave(w, pair.table, wave, 1);
    const uint64_t now = uint64_t{1} << bits;
    auto op = context_of(pair);
    CpuWorker later(*op, 0, 1);
    arrive(later, pair.table, now - 1);
    for (int wave = 0; wave < kWaves; ++wave) {
      check(pair.seen(wave, 1), "a wave that has come");
      check(!pair.seen(wave, now), "a wave that has not come yet");
    }
  }
}

const Suite suite({{"who_sees_the_tag_sees_what_every_worker_has_written",
                    who_sees_the_tag_sees_what_every_worker_has_written},
                   {"rows_have_arrived_once_the_last_worker_has_come_and_not_before",
                    rows_have_arrived_once_the_last_worker_has_come_and_not_before},
                   {"a_worker_two_waves_ahead_does_not_stand_in_for_one_that_is_behind",
                    a_worker_two_waves_ahead_does_not_stand_in_for_one_that_is_behind},
                   {"a_worker_that_failed_is_not_spoken_for", a_worker_that_failed_is_not_spoken_for},
                   {"waves_of_long_ago_are_not_taken_for_those_of_now",
                    waves_of_long_ago_are_not_taken_for_those_of_now}});

}  // namespace
}  // namespace commlib::testing
