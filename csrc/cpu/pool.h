// The pool: a rank's communication threads, and the order of its operations.
#pragma once

#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/event_count.h"
#include "protocol/control_block.h"

namespace commlib {

// One operation in the pool: run(i) is called once for each worker i.
struct Job {
  // Keeps what an asynchronous operation reads and writes alive until all workers have returned, whatever its
  // caller does meanwhile. Released on the last worker's thread.
  std::shared_ptr<void> held;
  std::function<void(int worker)> run;
  // Called once, on the last worker's thread, after all have returned, none by an exception. May throw.
  std::function<void()> finish;
  // Called by each worker whose run(i) throws, at once: others wait for it. May be empty.
  std::function<void(const std::exception_ptr&)> abandon;

  std::atomic<int> unfinished{0};  // workers yet to return (acq_rel: the last sees all others' work)
  std::atomic<bool> done{false};   // after `finish` (release), read by waiters (acquire)
  // A dispatch in waves: workers that have unpacked their part of each (release), read by waiters (acquire).
  std::atomic<int> unpacked[kWaves] = {};
  std::exception_ptr error;  // written before `done`
  // When worker 0 began and the last worker ended, in seconds of the monotonic clock; written before `done`.
  double begun = 0, ended = 0;
};

// Runs jobs strictly one after another, in the order submitted, each on all `workers` threads. The calling
// thread is worker 0 of a synchronous job, so with one worker nothing is handed over; thread 0 starts with
// the first asynchronous job.
class WorkerPool {
 public:
  // `cores`: those that its threads may run on; empty: any.
  WorkerPool(int workers, SpinPolicy spin, InterruptCheck interrupted, std::vector<int> cores = {});
  ~WorkerPool();  // finishes what has been submitted

  int workers() const { return workers_; }

  // Runs the job and returns when it is done, because its callers then free what it uses; rethrows what it
  // threw. If the user wants out before the job's turn comes, calls `interrupted`, which is to make the jobs
  // before it end soon, and throws Interrupted when this one has run.
  void run(const std::shared_ptr<Job>& job, const std::function<void()>& interrupted = [] {});
  // Returns at once.
  void submit(const std::shared_ptr<Job>& job);
  // Waits for a submitted job; rethrows what it threw. Throws Interrupted if the user wants out.
  void wait(const Job& job);
  // The same until all workers have unpacked a wave, or the job is done.
  void wait_wave(const Job& job, int wave);
  // A worker of the running job has unpacked its part of a wave.
  void unpacked(Job& job, int wave);
  // Waits until all submitted jobs are done, however they ended.
  void drain();
  // The same. Throws Interrupted if the user wants out.
  void drain_unless_interrupted();
  // Ends the threads, once all jobs are done and no more come. May be called twice.
  void stop();

 private:
  void start_threads(int first);
  bool is_empty();
  bool wants_out(bool signalled) const { return interrupted_ && interrupted_(signalled); }
  void thread_main(int worker);
  void run_part(Job& job, int worker);
  uint64_t enqueue(const std::shared_ptr<Job>& job, bool caller_is_worker_0);
  template <class Ready>
  void wait_until(Ready ready);

  struct Entry {
    std::shared_ptr<Job> job;
    bool caller_is_worker_0;
  };

  const int workers_;
  const SpinPolicy spin_;
  const InterruptCheck interrupted_;
  const std::vector<int> cores_;
  std::mutex mutex_;  // guards the members below it
  std::vector<std::thread> threads_;
  std::deque<Entry> queue_;  // front: the job that runs now
  // Counts jobs that have come to the front, so that each thread takes each job once. Written under the
  // mutex (release), read while spinning (acquire).
  std::atomic<uint64_t> front_number_{0};
  uint64_t submitted_ = 0;
  std::atomic<bool> stopping_{false};
  EventCount event_{};
};

}  // namespace commlib
