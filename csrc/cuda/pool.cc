#include "cuda/pool.h"

#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/driver.h"

namespace commlib::cuda {
namespace {

struct Idle {
  void* thing;
  void (*free)(void*);
};

struct Kept {
  std::shared_ptr<void> what;
  std::function<bool()> done;
};

struct Pool {
  std::mutex mutex;                                       // guards the members below it
  std::multimap<std::pair<int, std::string>, Idle> idle;  // by device and name
  std::vector<Kept> kept;
  std::map<int, int> shared;      // SharedDevices that live, by device
  std::recursive_mutex dropping;  // held before `mutex` while things that are done go
  std::mutex freeing;             // held first, so that no device becomes shared while its memory is freed
};

// Never destroyed: the end of a process is no place to wait, either.
Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

void* take_idle(int device, const std::string& name) {
  std::lock_guard<std::mutex> lock(pool().mutex);
  const auto found = pool().idle.find({device, name});
  if (found == pool().idle.end()) return nullptr;
  void* thing = found->second.thing;
  pool().idle.erase(found);
  return thing;
}

// Returns whether there was any.
bool free_all_idle(int device) {
  decltype(Pool::idle) idle;
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    for (auto it = pool().idle.begin(); it != pool().idle.end();) {
      const auto next = std::next(it);
      if (it->first.first == device && it->second.free) idle.insert(pool().idle.extract(it));
      it = next;
    }
  }
  const OnDevice guard(device);
  for (const auto& [_, thing] : idle) thing.free(thing.thing);
  return !idle.empty();
}

void* make_or_free(int device, const std::function<void*()>& make) {
  try {
    return make();
  } catch (const std::runtime_error&) {
    if (!free_all_idle(device)) throw;
  }
  return make();
}

}  // namespace

// Takes the whole list out, because what is dropped comes back to the pool. By one thread at a time, which
// may come back here from a destructor, so that what was done before the call has gone when it returns.
void drop_what_is_done() {
  std::lock_guard<std::recursive_mutex> one(pool().dropping);
  std::vector<Kept> kept;
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    kept.swap(pool().kept);
  }
  for (Kept& k : kept) {
    if (!k.done()) keep_until(std::move(k.what), std::move(k.done));
  }
}

std::shared_ptr<void> pooled(int device, const std::string& name, const std::function<void*()>& make,
                             void (*free)(void*)) {
  drop_what_is_done();
  const OnDevice guard(device);
  void* thing = take_idle(device, name);
  if (!thing) thing = make_or_free(device, make);
  return std::shared_ptr<void>(thing, [device, name, free](void* t) {
    std::lock_guard<std::mutex> lock(pool().mutex);
    pool().idle.insert({{device, name}, {t, free}});
  });
}

Memory device_memory(int device, size_t bytes) {
  const auto make = [bytes] {
    void* p = nullptr;
    check(cudaMalloc(&p, bytes), "cudaMalloc");
    return p;
  };
  return std::static_pointer_cast<std::byte>(
      pooled(device, "device memory " + std::to_string(bytes), make, [](void* p) { cudaFree(p); }));
}

Memory mapped_memory(int device, size_t bytes) {
  const auto make = [bytes] {
    void* p = nullptr;
    check(cudaHostAlloc(&p, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
    return p;
  };
  return std::static_pointer_cast<std::byte>(
      pooled(device, "mapped memory " + std::to_string(bytes), make, [](void* p) { cudaFreeHost(p); }));
}

Stream side_stream(int device) {
  const auto make = []() -> void* {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return stream;
  };
  return std::static_pointer_cast<CUstream_st>(pooled(device, "side stream", make, nullptr));
}

Stream comm_stream(int device) {
  const auto make = []() -> void* {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest_priority()),
          "cudaStreamCreateWithPriority");
    return stream;
  };
  return std::static_pointer_cast<CUstream_st>(pooled(device, "communication stream", make, nullptr));
}

int highest_priority() {
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  return greatest;
}

bool is_idle(cudaStream_t stream) {
  const cudaError_t error = cudaStreamQuery(stream);
  if (error != cudaSuccess) cudaGetLastError();
  return error != cudaErrorNotReady;
}

void keep_until(std::shared_ptr<void> what, std::function<bool()> done) {
  std::lock_guard<std::mutex> lock(pool().mutex);
  pool().kept.push_back({std::move(what), std::move(done)});
}

SharedDevice::SharedDevice(int device) : device_(device) {
  std::lock_guard<std::mutex> not_now(pool().freeing);
  std::lock_guard<std::mutex> lock(pool().mutex);
  ++pool().shared[device_];
}

SharedDevice::~SharedDevice() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  --pool().shared[device_];
}

void free_idle(int device) {
  drop_what_is_done();
  std::lock_guard<std::mutex> freeing(pool().freeing);
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    if (pool().shared[device] > 0) return;
  }
  free_all_idle(device);
}

}  // namespace commlib::cuda
