// The pool and the barrier of its workers, by themselves. Counters are plain: ThreadSanitizer sees where an
// order that the pool promises is missing.
#include <chrono>

#include "../suite.h"
#include "cpu/pool.h"

namespace commlib::testing {
namespace {

using JobPtr = std::shared_ptr<Job>;

JobPtr make_job(std::function<void(int)> run, std::function<void()> finish = [] {}) {
  auto job = std::make_shared<Job>();
  job->run = std::move(run);
  job->finish = std::move(finish);
  return job;
}

void sleep_us(int64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

void every_worker_takes_each_job_once_and_finish_comes_last() {
  for (int workers = 1; workers <= 3; ++workers) {
    WorkerPool pool(workers, {}, nullptr);
    check_equal(pool.workers(), workers, "workers");
    std::vector<int> calls(workers, 0);  // by worker, each its own
    int finished = 0;
    for (int i = 0; i < 50; ++i) {
      const JobPtr job = make_job([&](int worker) { ++calls[worker]; },
                                  [&] {
                                    ++finished;
                                    for (const int n : calls)
                                      check_equal(n, finished, "calls of a worker at the finish");
                                  });
      if (i % 2 == 0) {
        pool.run(job);
      } else {
        pool.submit(job);
        pool.wait(*job);
      }
      check(job->done.load(), "the job is done");
      check_equal(finished, i + 1, "jobs finished");
    }
  }
}

void jobs_run_one_after_another_in_the_order_submitted() {
  Random random(60);
  for (int workers = 1; workers <= 3; ++workers) {
    for (const SpinPolicy spin : {SpinPolicy{}, SpinPolicy{0, 0}}) {
      std::vector<int> order, wanted;
      WorkerPool pool(workers, spin, nullptr);
      for (int i = 0; i < 60; ++i) {
        wanted.push_back(i);
        const JobPtr job = make_job([](int) {}, [&order, i] { order.push_back(i); });
        if (random.one_in(3)) {
          pool.run(job);
        } else {
          pool.submit(job);
        }
        if (random.one_in(4)) sleep_us(random.below(100));
      }
      pool.drain();
      check(order == wanted, "jobs finish in the order submitted");
    }
  }
}

void many_threads_may_submit_and_wait() {
  for (int workers = 1; workers <= 3; ++workers) {
    WorkerPool pool(workers, {}, nullptr);
    int finished = 0;
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 4; ++t) {
      threads.emplace_back([&pool, &finished, t] {
        Random random(70 + t);
        for (int i = 0; i < 40; ++i) {
          int mine = 0;
          const JobPtr job = make_job(
              [&mine](int worker) {
                if (worker == 0) ++mine;
              },
              [&finished] { ++finished; });
          if (random.one_in(2)) {
            pool.run(job);
          } else {
            pool.submit(job);
            if (random.one_in(2)) sleep_us(random.below(50));
            pool.wait(*job);
          }
          if (mine != 1) std::abort();
        }
      });
    }
    for (std::thread& t : threads) t.join();
    check_equal(finished, 4 * 40, "jobs finished");
  }
}

void exceptions_reach_the_waiter_and_the_next_job_runs() {
  for (int workers = 1; workers <= 3; ++workers) {
    WorkerPool pool(workers, {}, nullptr);
    const auto expect = [&](const JobPtr& job, bool async, const char* text) {
      const auto error = check_throws<std::runtime_error>(
          [&] {
            if (!async) return pool.run(job);
            pool.submit(job);
            pool.wait(*job);
          },
          "a job that throws");
      check_equal(std::string(error.what()), std::string(text), "the text");
    };
    for (const bool async : {false, true}) {
      bool finished = false;
      expect(make_job(
                 [&](int worker) {
                   if (worker == workers - 1) throw std::runtime_error("in run");
                 },
                 [&] { finished = true; }),
             async, "in run");
      check(!finished, "a job that threw has no finish");
      expect(make_job([](int) {}, [] { throw std::runtime_error("in finish"); }), async, "in finish");
      pool.run(make_job([](int) {}, [&] { finished = true; }));
      check(finished, "the next job runs");
    }
  }
}

void a_worker_that_throws_is_reported_while_others_still_work() {
  WorkerPool pool(2, {}, nullptr);
  for (const int thrower : {0, 1}) {
    std::atomic<bool> told{false};
    const JobPtr job = make_job(
        [&](int worker) {
          if (worker == thrower) throw std::runtime_error("in run");
          while (!told.load()) std::this_thread::yield();  // as at a barrier with the one that threw
        },
        [] {});
    job->abandon = [&](const std::exception_ptr&) { told.store(true); };
    check_throws<std::runtime_error>([&] { pool.run(job); }, "a job that throws");
  }
}

void a_job_lets_go_of_what_it_holds_before_it_is_done() {
  WorkerPool pool(2, {}, nullptr);
  for (int i = 0; i < 20; ++i) {
    auto held = std::make_shared<int>(1);
    const JobPtr job = make_job([held](int) {}, [held] {});
    pool.submit(job);
    pool.wait(*job);
    check_equal(held.use_count(), 1L, "owners");
  }
}

void drain_and_destruction_finish_what_was_submitted() {
  for (int workers = 1; workers <= 3; ++workers) {
    int finished = 0;
    {
      WorkerPool pool(workers, {}, nullptr);
      const auto slow = [&] { return make_job([](int) { sleep_us(300); }, [&] { ++finished; }); };
      for (int i = 0; i < 5; ++i) pool.submit(slow());
      pool.drain();
      check_equal(finished, 5, "jobs finished");
      for (int i = 0; i < 5; ++i) pool.submit(slow());
    }
    check_equal(finished, 10, "jobs finished");
    WorkerPool idle(workers, {}, nullptr);  // destroyed without having run a job
  }
}

std::atomic<bool> user_wants_out{false};

void a_waiting_user_may_interrupt() {
  std::atomic<bool> released{false};
  WorkerPool pool(1, {}, [](bool) { return user_wants_out.load(); });
  const JobPtr job = make_job([&](int) {
    while (!released.load()) sleep_us(100);
  });
  pool.submit(job);
  user_wants_out = true;
  check_throws<Interrupted>([&] { pool.wait(*job); }, "an interrupted wait");
  user_wants_out = false;
  released = true;
  pool.wait(*job);
}

void a_wait_for_its_turn_may_be_interrupted() {
  std::atomic<bool> released{false};
  std::atomic<int> ran{0};
  WorkerPool pool(2, {}, [](bool) { return user_wants_out.load(); });
  pool.submit(make_job([&](int) {
    while (!released.load()) sleep_us(100);
  }));
  user_wants_out = true;
  // It is reported once, makes the jobs before it end, and the job runs in its turn: nothing is left in the
  // queue.
  int told = 0;
  const auto end_others = [&] {
    ++told;
    released = true;
  };
  check_throws<Interrupted>([&] { pool.run(make_job([&](int) { ++ran; }), end_others); },
                            "a run that is interrupted before its turn");
  user_wants_out = false;
  check_equal(told, 1, "calls that end the others");
  check_equal(ran.load(), 2, "workers that have run the job");
  pool.run(make_job([](int) {}));
}

void an_interrupted_run_returns_when_all_workers_have() {
  std::atomic<int> at_work{0};
  WorkerPool pool(3, {}, [](bool) { return user_wants_out.load(); });
  user_wants_out = true;
  check_throws<std::runtime_error>(
      [&] {
        pool.run(make_job([&](int worker) {
          if (worker == 0) throw std::runtime_error("Ctrl-C");
          ++at_work;
          sleep_us(60'000);  // beyond a nap
          --at_work;
        }));
      },
      "a job whose caller was interrupted");
  user_wants_out = false;
  check_equal(at_work.load(), 0, "workers at work when run() has returned");
}

void a_job_holds_what_it_was_given_until_all_workers_have_returned() {
  std::atomic<bool> gone{false};
  std::atomic<int> seen{0};
  WorkerPool pool(2, {}, nullptr);
  const JobPtr job = make_job([&](int) {
    sleep_us(1000);
    if (!gone) ++seen;
  });
  job->held = std::shared_ptr<void>(&gone, [](void* p) { *static_cast<std::atomic<bool>*>(p) = true; });
  pool.submit(job);
  pool.wait(*job);
  check_equal(seen.load(), 2, "workers that found it alive");
  check(gone.load(), "it is given up with the job");
}

const Suite suite(
    {{"every_worker_takes_each_job_once_and_finish_comes_last",
      every_worker_takes_each_job_once_and_finish_comes_last},
     {"jobs_run_one_after_another_in_the_order_submitted", jobs_run_one_after_another_in_the_order_submitted},
     {"many_threads_may_submit_and_wait", many_threads_may_submit_and_wait},
     {"exceptions_reach_the_waiter_and_the_next_job_runs", exceptions_reach_the_waiter_and_the_next_job_runs},
     {"a_worker_that_throws_is_reported_while_others_still_work",
      a_worker_that_throws_is_reported_while_others_still_work},
     {"a_job_lets_go_of_what_it_holds_before_it_is_done", a_job_lets_go_of_what_it_holds_before_it_is_done},
     {"drain_and_destruction_finish_what_was_submitted", drain_and_destruction_finish_what_was_submitted},
     {"a_waiting_user_may_interrupt", a_waiting_user_may_interrupt},
     {"a_wait_for_its_turn_may_be_interrupted", a_wait_for_its_turn_may_be_interrupted},
     {"an_interrupted_run_returns_when_all_workers_have", an_interrupted_run_returns_when_all_workers_have},
     {"a_job_holds_what_it_was_given_until_all_workers_have_returned",
      a_job_holds_what_it_was_given_until_all_workers_have_returned}});

}  // namespace
}  // namespace commlib::testing
