// The CUDA backend on a GPU for the tests of tests/cpp/: each rank is a stream of device 0.
#include "cpp/backend.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "arena.h"
#include "cpp/check.h"
#include "cpp/memory.h"
#include "cuda/communicator.h"
#include "options.h"
#include "watchdog.h"

namespace commlib::testing {
namespace {

constexpr size_t kArenaBytes = size_t{256} << 20;
// Tests leave hangs to the whole program's limit; here a kernel that waits must give up first.
constexpr double kLongestTimeout = 20;
constexpr int kRankStreams = 8;  // made at the start

Options asked;
Arena arena;

// Streams of one priority. Priorities keep them apart in hardware: a wait for a peer, a wait for an expert's
// rows, and copies that either may depend on, must not queue behind each other.
class Streams {
 public:
  void open(int priority, int count) {
    std::lock_guard<std::mutex> lock(mutex_);
    priority_ = priority;
    while (static_cast<int>(all_.size()) < count) add();
    free_ = all_;
  }

  cudaStream_t at(int index) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int>(all_.size()) <= index) add();
    return all_[index];
  }

  cudaStream_t take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      add();
      return all_.back();
    }
    const cudaStream_t stream = free_.back();
    free_.pop_back();
    return stream;
  }
  void give_back(cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(stream);
  }

 private:
  void add() {
    cudaStream_t stream = nullptr;
    cuda::check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority_),
                "cudaStreamCreateWithPriority");
    all_.push_back(stream);
  }

  std::mutex mutex_;  // guards the members below it
  int priority_ = 0;
  std::vector<cudaStream_t> all_, free_;
};

Streams of_ranks, of_plans, of_waits, of_copies;

class Taken {
 public:
  explicit Taken(Streams& from) : from_(from), stream(from.take()) {}
  ~Taken() { from_.give_back(stream); }
  Taken(const Taken&) = delete;
  Taken& operator=(const Taken&) = delete;

 private:
  Streams& from_;

 public:
  const cudaStream_t stream;
};

class RealGpu : public Machine {
 public:
  ~RealGpu() override { forget_ranks(); }

  std::unique_ptr<Communicator> communicator(const Config& wanted) override {
    if (wanted.size > asked.ranks_max)
      throw NotRun(std::to_string(wanted.size) + " ranks, and --ranks-max is " +
                   std::to_string(asked.ranks_max));
    pthread_setname_np(pthread_self(), ("rank " + std::to_string(wanted.rank)).c_str());
    Config config = wanted;
    config.vector_ops.clear();
    config.timeout = std::min(config.timeout, kLongestTimeout);
    if (config.share.empty()) config.share = cuda::facts_of(0).shares_fds ? "fd" : "none";
    config.stream = reinterpret_cast<uintptr_t>(of_ranks.at(config.rank));
    if (config.size * (config.num_sms + 1) <= cuda::facts_of(0).sms)
      config.plan_stream = reinterpret_cast<uintptr_t>(of_plans.at(config.rank));
    auto comm = std::make_unique<cuda::CudaCommunicator>(config);
    watch_rank(config.rank, &comm->host_state());
    return comm;
  }

  // Freeing it may wait for kernels of ranks that are not done, and keep others from launching theirs.
  void retire(std::shared_ptr<Communicator> comm) override {
    if (!comm) return;
    try {
      comm->close();
    } catch (const std::exception&) {  // the test has seen it, or does not want to
    }
    std::lock_guard<std::mutex> lock(mutex_);
    retired_.push_back(std::move(comm));
  }

  std::string error() override { return arena.take_overruns(); }

 private:
  std::mutex mutex_;  // guards retired_
  std::vector<std::shared_ptr<Communicator>> retired_;
};

}  // namespace

// One copy of each kind, so that none is the first of its kind while kernels wait.
void start(const Options& options) {
  asked = options;
  cuda::check(cudaSetDevice(0), "cudaSetDevice");
  cuda::check(cudaFree(nullptr), "cudaFree", "The device's context could not be made.");
  int least = 0, greatest = 0;
  cuda::check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  of_ranks.open(greatest, kRankStreams);
  of_plans.open(greatest, kRankStreams);
  of_waits.open(std::max(greatest, least - 2), 8);
  of_copies.open(std::max(greatest, least - 1), 8);
  arena.open(kArenaBytes, options.managed);
  std::byte* device = nullptr;
  cuda::check(cudaMalloc(reinterpret_cast<void**>(&device), 2 << 20), "cudaMalloc");
  auto* host = static_cast<std::byte*>(allocate(1 << 20));
  copy_bytes(device, host, 1 << 20);
  copy_bytes(device + (1 << 20), device, 1 << 20);
  copy_bytes(host, device, 1 << 20);
  release(host);
  cuda::check(cudaFree(device), "cudaFree");
}

void* allocate(size_t bytes) { return arena.take(bytes); }

void release(void* memory) { arena.give_back(memory); }

// Beside all kernels; either address may lie on the device.
void copy_bytes(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  if (arena.has(to) && arena.has(from)) {
    std::memcpy(to, from, bytes);
    return;
  }
  const Taken copies(of_copies);
  cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, copies.stream), "cudaMemcpyAsync");
  cuda::check(cudaStreamSynchronize(copies.stream), "cudaStreamSynchronize");
}

std::unique_ptr<Machine> make_machine() { return std::make_unique<RealGpu>(); }

void settle(Communicator& comm) { comm.synchronize(); }

// On a stream of its own, as compute has.
void wait_expert(Communicator& comm, const PendingDispatch& dispatch, const Ticket& ticket, int64_t expert) {
  const Taken waits(of_waits);
  comm.wait_expert(dispatch, ticket, expert, reinterpret_cast<uintptr_t>(waits.stream));
  cuda::check(cudaStreamSynchronize(waits.stream), "cudaStreamSynchronize");
  comm.check_health();
}

bool is_done(Communicator& comm, const Ticket&) {
  return cudaStreamQuery(reinterpret_cast<cudaStream_t>(comm.config().stream)) == cudaSuccess;
}

std::vector<std::string> vector_paths() { return {""}; }

int rounds(int many) { return (many + asked.fewer - 1) / asked.fewer; }

}  // namespace commlib::testing
