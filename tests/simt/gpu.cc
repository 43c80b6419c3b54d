// The thread that runs a simulated GPU, and how other threads reach it.
#include "simt/gpu.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <utility>

#include "simt/machine.h"

namespace simt {

// Between the machine, which runs on the GPU's thread, and all others.
class Gpu::Doorman : public Host {
 public:
  explicit Doorman(Gpu& gpu) : gpu_(gpu) {}

  void take_in() override {
    if (--looks_ > 0) return;  // a mutex for each step would cost more than the step
    looks_ = kSteps;
    std::unique_lock<std::mutex> lock(gpu_.mutex_);
    take_in(lock);
  }
  uint64_t wait(uint64_t ns) override {
    const uint64_t start = real_time();
    std::unique_lock<std::mutex> lock(gpu_.mutex_);
    const auto come = [&] { return gpu_.off_ || !gpu_.requests_.empty(); };
    if (ns == UINT64_MAX) {
      gpu_.come_.wait(lock, come);
    } else {
      gpu_.come_.wait_for(lock, std::chrono::nanoseconds(ns), come);
    }
    take_in(lock);
    return real_time() - start;
  }
  void kernel_ended(int stream) override {
    std::lock_guard<std::mutex> lock(gpu_.mutex_);
    ++gpu_.progress_[stream].ended;
    gpu_.gone_on_.notify_all();
  }

 private:
  static constexpr int kSteps = 64;

  void take_in(std::unique_lock<std::mutex>& lock) {
    if (gpu_.off_) machine->report("switched off");
    std::deque<std::function<void(Machine&)>> requests;
    requests.swap(gpu_.requests_);
    lock.unlock();
    for (const auto& request : requests) request(*machine);
  }

  Gpu& gpu_;
  int looks_ = 0;
};

Gpu::Gpu(const Config& config) : config(config), thread_([this] { run(); }) {}

Gpu::~Gpu() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    off_ = true;
    come_.notify_all();
  }
  thread_.join();
}

void Gpu::run() {
  Doorman doorman(*this);
  Machine machine(config, &doorman);
  const Result result = machine.run();
  std::unique_lock<std::mutex> lock(mutex_);
  if (!off_) error_ = result.error;
  gone_on_.notify_all();
  come_.wait(lock, [&] { return off_; });  // mappings and allocations may go only after the machine
}

void Gpu::post(std::function<void(Machine&)> request) {
  requests_.push_back(std::move(request));
  come_.notify_all();
}

void Gpu::launch(int stream, unsigned grid, unsigned block, size_t shared_bytes, std::function<void()> body,
                 const void* mapped) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++progress_[stream].launched;
  post(
      [=, body = std::move(body)](Machine& m) { m.launch(stream, grid, block, shared_bytes, body, mapped); });
}

void Gpu::await(std::unique_lock<std::mutex>& lock, const std::function<bool()>& done) {
  gone_on_.wait(lock, [&] { return !error_.empty() || done(); });
}

bool Gpu::idle(int stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  return progress_[stream].ended == progress_[stream].launched;
}

void Gpu::synchronize(int stream) {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t launched = progress_[stream].launched;
  await(lock, [&] { return progress_[stream].ended >= launched; });
}

void Gpu::synchronize() {
  std::unique_lock<std::mutex> lock(mutex_);
  const std::map<int, Progress> now = progress_;
  await(lock, [&] {
    return std::all_of(now.begin(), now.end(),
                       [&](const auto& p) { return progress_[p.first].ended >= p.second.launched; });
  });
}

std::string Gpu::error() {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void* Gpu::map(void* host, size_t bytes) {
  if (!config.delay_stores) return host;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto known = views_.find(host);
  if (known != views_.end()) return known->second.get();
  auto view = std::make_unique<std::byte[]>(bytes);
  auto* device = view.get();
  std::memcpy(device, host, bytes);
  views_[host] = std::move(view);
  post([=](Machine& m) {
    auto* h = static_cast<std::byte*>(host);
    const std::vector<std::byte> was(device, device + bytes);
    m.mappings.push_back(std::make_unique<Mapping>(Mapping{h, device, bytes, was, was}));
  });
  return device;
}

void Gpu::renew(void* host) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (views_.count(host) == 0) return;
  post([=](Machine& m) {
    for (const auto& mapping : m.mappings) {
      if (mapping->host != host) continue;
      mapping->host_was.assign(mapping->host, mapping->host + mapping->bytes);
      mapping->device_was = mapping->host_was;
      std::copy(mapping->host_was.begin(), mapping->host_was.end(), mapping->device);
    }
  });
}

void Gpu::unmap(void* host) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (views_.count(host) == 0) return;
  bool done = false;
  post([&](Machine& m) {
    m.mappings.erase(std::remove_if(m.mappings.begin(), m.mappings.end(),
                                    [&](const auto& mapping) { return mapping->host == host; }),
                     m.mappings.end());
    std::lock_guard<std::mutex> inner(mutex_);
    done = true;
    gone_on_.notify_all();
  });
  await(lock, [&] { return done; });
  views_.erase(host);
}

}  // namespace simt
