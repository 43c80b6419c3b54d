// The CUDA backend for the tests of tests/cpp/: each world has a simulated GPU of its own, each rank a
// stream.
#include "cpp/backend.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "cpp/check.h"
#include "cpp/memory.h"
#include "cuda/communicator.h"
#include "simt/runtime/cudart.h"

namespace commlib::testing {
namespace {

// Every other world has weak memory.
simt::Config config_of(uint64_t world) {
  simt::Config config;
  config.seed = seed() + world;
  config.delay_stores = world % 2 == 0;
  config.sms = simt::resident_blocks;
  config.find_races = simt::accesses_are_seen();
  return config;
}

class SimulatedGpu : public Machine {
 public:
  explicit SimulatedGpu(uint64_t world) : gpu_(config_of(world)), plans_beside_(world % 3 != 0) {
    simt::gpu = &gpu_;
  }
  ~SimulatedGpu() override { simt::gpu = nullptr; }

  std::unique_ptr<Communicator> communicator(const Config& asked) override {
    Config config = asked;
    config.vector_ops.clear();
    if (config.share.empty()) config.share = "none";  // memory to the byte
    config.stream = new_stream();
    if (plans_beside_) config.plan_stream = new_stream();
    return std::make_unique<cuda::CudaCommunicator>(config);
  }

  std::string error() override { return gpu_.error(); }

 private:
  uintptr_t new_stream() {
    cudaStream_t stream;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    // Never destroyed, like those of cuda/pool.h: a lease may outlive its world, and ask about them.
    static auto& streams = *new std::vector<cudaStream_t>;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    streams.push_back(stream);
    return reinterpret_cast<uintptr_t>(stream);
  }

  simt::Gpu gpu_;
  const bool plans_beside_;  // on a stream of their own
};

}  // namespace

std::unique_ptr<Machine> make_machine() {
  static uint64_t worlds = 0;
  return std::make_unique<SimulatedGpu>(worlds++);
}

void settle(Communicator& comm) { comm.synchronize(); }

// On a stream of its own, as compute has.
void wait_expert(Communicator& comm, const PendingDispatch& dispatch, const Ticket& ticket, int64_t expert) {
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  comm.wait_expert(dispatch, ticket, expert, reinterpret_cast<uintptr_t>(stream));
  cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  comm.check_health();
}

bool is_done(Communicator& comm, const Ticket&) {
  return cudaStreamQuery(reinterpret_cast<cudaStream_t>(comm.config().stream)) == cudaSuccess;
}

std::vector<std::string> vector_paths() { return {""}; }

// Looking for races takes its time.
int rounds(int many) {
  const int of = simt::accesses_are_seen() ? 32 : 16;
  return (many + of - 1) / of;
}

void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
  return memory;
}

void release(void* memory) { std::free(memory); }

void copy_bytes(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // neither pointer may be null, even for no bytes
}

}  // namespace commlib::testing
