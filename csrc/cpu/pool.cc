#include "cpu/pool.h"

#include <csignal>
#include <stdexcept>
#include <string>

namespace commlib {
namespace {

bool never(bool) { return false; }

bool is_done(const Job& job) { return job.done.load(std::memory_order_acquire); }

// Best effort: a core that has gone meanwhile costs speed, not correctness.
void pin_this_thread(const std::vector<int>& cores) {
  if (cores.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : cores) CPU_SET(core, &set);
  sched_setaffinity(0, sizeof set, &set);
}

}  // namespace

WorkerPool::WorkerPool(int workers, SpinPolicy spin, InterruptCheck interrupted, std::vector<int> cores)
    : workers_(workers), spin_(spin), interrupted_(interrupted), cores_(std::move(cores)) {
  if (workers == 1) return;
  try {
    start_threads(1);
  } catch (...) {
    stop();
    throw;
  }
}

WorkerPool::~WorkerPool() {
  drain();
  stop();
}

void WorkerPool::stop() {
  stopping_.store(true, std::memory_order_release);
  notify(event_);
  for (std::thread& t : threads_) t.join();
  threads_.clear();
}

// Signals are for the program's own threads: the pool's threads inherit a mask that blocks them all.
void WorkerPool::start_threads(int first) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::string why;
  for (int i = first; i < (first == 0 ? 1 : workers_) && why.empty(); ++i) {
    try {
      threads_.emplace_back([this, i] { thread_main(i); });
    } catch (const std::exception& e) {
      why = e.what();
    }
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (why.empty()) return;
  throw std::runtime_error("cannot start communication thread " + std::to_string(threads_.size() + 1) +
                           " of " + std::to_string(workers_) + ": " + why +
                           ". Lower num_sms, or raise the limit of threads (ulimit -u, the container's pids) "
                           "or of address space (ulimit -v)");
}

uint64_t WorkerPool::enqueue(const std::shared_ptr<Job>& job, bool caller_is_worker_0) {
  job->unfinished.store(workers_, std::memory_order_relaxed);
  uint64_t number;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!caller_is_worker_0 && threads_.size() < static_cast<size_t>(workers_)) start_threads(0);
    number = ++submitted_;
    queue_.push_back({job, caller_is_worker_0});
    if (queue_.size() == 1) front_number_.fetch_add(1, std::memory_order_release);
  }
  notify(event_);
  return number;
}

void WorkerPool::submit(const std::shared_ptr<Job>& job) { enqueue(job, false); }

void WorkerPool::run(const std::shared_ptr<Job>& job, const std::function<void()>& interrupted) {
  const uint64_t number = enqueue(job, true);
  bool out = false;
  const auto is_its_turn = [&] { return front_number_.load(std::memory_order_acquire) >= number; };
  wait_on(event_, spin_, is_its_turn, [&](bool signalled) {
    if (!out && wants_out(signalled)) {
      out = true;
      interrupted();
    }
    return false;
  });
  run_part(*job, 0);
  // The others end by themselves: a worker that fails ends their waits. Until then they use the caller's
  // memory.
  wait_on(event_, spin_, [&] { return is_done(*job); }, never);
  if (out) throw Interrupted{};
  if (job->error) std::rethrow_exception(job->error);
}

template <class Ready>
void WorkerPool::wait_until(Ready ready) {
  if (!wait_on(event_, spin_, ready, [&](bool signalled) { return wants_out(signalled); }))
    throw Interrupted{};
}

void WorkerPool::wait(const Job& job) {
  wait_until([&] { return is_done(job); });
  if (job.error) std::rethrow_exception(job.error);
}

void WorkerPool::wait_wave(const Job& job, int wave) {
  wait_until([&] { return job.unpacked[wave].load(std::memory_order_acquire) == workers_ || is_done(job); });
  if (is_done(job) && job.error) std::rethrow_exception(job.error);
}

void WorkerPool::unpacked(Job& job, int wave) {
  // acq_rel: a thread that sees the last worker's count has seen all others' work.
  if (job.unpacked[wave].fetch_add(1, std::memory_order_acq_rel) == workers_ - 1) notify(event_);
}

bool WorkerPool::is_empty() {
  std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty();
}

void WorkerPool::drain() {
  wait_on(event_, spin_, [&] { return is_empty(); }, never);
}

void WorkerPool::drain_unless_interrupted() {
  wait_until([&] { return is_empty(); });
}

void WorkerPool::run_part(Job& job, int worker) {
  if (worker == 0) job.begun = monotonic_seconds();
  try {
    job.run(worker);
  } catch (...) {
    if (job.abandon) job.abandon(std::current_exception());
    std::lock_guard<std::mutex> lock(mutex_);
    if (!job.error) job.error = std::current_exception();
  }
  if (job.unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  if (!job.error) {
    try {
      job.finish();
    } catch (...) {
      job.error = std::current_exception();
    }
  }
  job.ended = monotonic_seconds();
  job.run = nullptr;  // what it holds (slots, tensors) is free from here on
  job.finish = nullptr;
  job.abandon = nullptr;
  job.held = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // `done` is set before the next job can start, and before the queue can be seen empty.
    std::shared_ptr<Job> keep = std::move(queue_.front().job);
    keep->done.store(true, std::memory_order_release);
    queue_.pop_front();
    if (!queue_.empty()) front_number_.fetch_add(1, std::memory_order_release);
  }
  notify(event_);
}

void WorkerPool::thread_main(int worker) {
  pin_this_thread(cores_);
  for (uint64_t next = 1;; ++next) {
    wait_on(
        event_, spin_,
        [&] {
          return front_number_.load(std::memory_order_acquire) >= next ||
                 stopping_.load(std::memory_order_acquire);
        },
        never);
    std::shared_ptr<Job> job;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const uint64_t front = front_number_.load(std::memory_order_relaxed);
      if (front < next) return;  // stopping
      // Jobs need thread 0 only where no caller stands in for it, so jobs may have passed it by.
      next = front;
      if (queue_.empty() || (worker == 0 && queue_.front().caller_is_worker_0)) continue;
      job = queue_.front().job;
    }
    run_part(*job, worker);
  }
}

}  // namespace commlib
