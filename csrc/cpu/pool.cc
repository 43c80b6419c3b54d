#include "cpu/pool.h"

namespace commlib {
namespace {

bool never() { return false; }

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
  if (workers > 1) start_threads(1);
}

WorkerPool::~WorkerPool() {
  drain();
  stopping_.store(true, std::memory_order_release);
  ring(bell_);
  for (std::thread& t : threads_) t.join();
}

void WorkerPool::start_threads(int first) {
  for (int i = first; i < (first == 0 ? 1 : workers_); ++i) {
    threads_.emplace_back([this, i] { thread_main(i); });
  }
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
  ring(bell_);
  return number;
}

void WorkerPool::submit(const std::shared_ptr<Job>& job) { enqueue(job, false); }

void WorkerPool::run(const std::shared_ptr<Job>& job) {
  const uint64_t number = enqueue(job, true);
  wait_on(bell_, spin_, [&] { return front_number_.load(std::memory_order_acquire) >= number; }, never);
  run_part(*job, 0);
  wait(*job);
}

template <class Ready>
void WorkerPool::wait_until(Ready ready) {
  if (!wait_on(bell_, spin_, ready, [&] { return interrupted_ && interrupted_(); })) throw Interrupted{};
}

void WorkerPool::wait(const Job& job) {
  wait_until([&] { return job.done.load(std::memory_order_acquire); });
  if (job.error) std::rethrow_exception(job.error);
}

void WorkerPool::wait_wave(const Job& job, int wave) {
  const auto is_done = [&] { return job.done.load(std::memory_order_acquire); };
  wait_until([&] { return job.delivered[wave].load(std::memory_order_acquire) == workers_ || is_done(); });
  if (is_done() && job.error) std::rethrow_exception(job.error);
}

void WorkerPool::delivered(Job& job, int wave) {
  // acq_rel: who sees the last worker's count has seen all others' work.
  if (job.delivered[wave].fetch_add(1, std::memory_order_acq_rel) == workers_ - 1) ring(bell_);
}

void WorkerPool::drain() {
  wait_on(
      bell_, spin_,
      [&] {
        std::lock_guard<std::mutex> lock(mutex_);
        return queue_.empty();
      },
      never);
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
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // `done` is set before the next job can start, and before the queue can be seen empty.
    std::shared_ptr<Job> keep = std::move(queue_.front().job);
    keep->done.store(true, std::memory_order_release);
    queue_.pop_front();
    if (!queue_.empty()) front_number_.fetch_add(1, std::memory_order_release);
  }
  ring(bell_);
}

void WorkerPool::thread_main(int worker) {
  pin_this_thread(cores_);
  for (uint64_t next = 1;; ++next) {
    wait_on(
        bell_, spin_,
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
      // Jobs need thread 0 only where no caller stands in for it, so it may have been passed by.
      next = front;
      if (queue_.empty() || (worker == 0 && queue_.front().caller_is_worker_0)) continue;
      job = queue_.front().job;
    }
    run_part(*job, worker);
  }
}

}  // namespace commlib
