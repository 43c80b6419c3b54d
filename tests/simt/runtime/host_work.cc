#include "simt/runtime/host_work.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "simt/runtime/cudart.h"

namespace simt {

std::atomic<uint64_t> always_late_ns{0};

namespace {

using Works = std::vector<std::function<void()>>;

struct Queue {
  std::mutex mutex;  // held while its work is done or handed over, so that its order stays
  Works works;
};

std::mutex queues_mutex;
std::map<int, Queue>& queues = *new std::map<int, Queue>;  // by number of the stream; outlives all threads

Queue& queue_of(int stream) {
  std::lock_guard<std::mutex> lock(queues_mutex);
  return queues[stream];
}

// In a kernel.
void sleep_for(uint64_t ns) {
  constexpr uint64_t kStepNs = 10'000;
  for (const uint64_t end = clock_ns() + ns; clock_ns() < end;) nanosleep(kStepNs);
}

void do_all(const Works& works) {
  for (const auto& work : works) work();
}

uint64_t lateness() {
  constexpr uint64_t kOftenNs = 50'000, kSeldomNs = 5'000'000;
  static std::atomic<unsigned> times{0};
  const uint64_t seldom = ++times % 16 == 0 ? kSeldomNs : kOftenNs;
  return std::max(always_late_ns.load(), seldom);
}

// With the queue's mutex.
void give(int stream, Queue& queue) {
  if (queue.works.empty()) return;
  auto works = std::make_shared<Works>(std::exchange(queue.works, {}));
  gpu->launch(stream, 1, 1, 0, [works, ns = lateness()] {
    sleep_for(ns);
    do_all(*works);
  });
}

}  // namespace

void put_off(cudaStream_t stream, std::function<void()> work) {
  const auto again = [work](cudaStream_t on) {
    put_off(on, work);
    return cudaSuccess;
  };
  if (capture(stream, again)) return;
  Queue& queue = queue_of(number_of(stream));
  std::lock_guard<std::mutex> lock(queue.mutex);
  queue.works.push_back(std::move(work));
}

void catch_up(cudaStream_t stream) {
  const int number = number_of(stream);
  Queue& queue = queue_of(number);
  for (;;) {
    gpu->synchronize(number);
    std::lock_guard<std::mutex> lock(queue.mutex);
    if (!gpu->error().empty()) return;
    if (!gpu->idle(number)) continue;  // another thread has queued more
    do_all(std::exchange(queue.works, {}));
    return;
  }
}

void hand_over(cudaStream_t stream) {
  const int number = number_of(stream);
  Queue& queue = queue_of(number);
  std::lock_guard<std::mutex> lock(queue.mutex);
  give(number, queue);
}

void hand_over_all() {
  std::lock_guard<std::mutex> all(queues_mutex);
  for (auto& [number, queue] : queues) {
    std::lock_guard<std::mutex> lock(queue.mutex);
    give(number, queue);
  }
}

void launch(cudaStream_t stream, unsigned grid, unsigned block, size_t shared_bytes,
            std::function<void()> body, const void* mapped) {
  const int number = number_of(stream);
  Queue& queue = queue_of(number);
  std::lock_guard<std::mutex> lock(queue.mutex);
  give(number, queue);
  gpu->launch(number, grid, block, shared_bytes, std::move(body), mapped);
}

uint64_t clock_ns() {
  const std::chrono::nanoseconds now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(now.count());
}

void sleep(cudaStream_t stream, uint64_t ns) {
  launch(stream, 1, 1, 0, [ns] { sleep_for(ns); });
}

}  // namespace simt
