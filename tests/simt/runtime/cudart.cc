// Device memory is host memory, allocated to the byte; streams, kernels and asynchronous copies are those of
// the simulated GPU. Only what csrc/cuda/ calls is here.
#include "simt/runtime/cudart.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "cuda/ptx.cuh"
#include "simt/runtime/capture.h"
#include "simt/runtime/driver.h"
#include "simt/runtime/host_work.h"

namespace simt {

Gpu* gpu = nullptr;
int resident_blocks = 1 << 30;
Chip chip = commlib::ptx::kHasBulkCopies ? Chip{9, 228 << 10} : Chip{8, 164 << 10};
bool peers_reach_each_other = true;
thread_local bool next_launch_fails = false;

namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kReservedShared = 1024;  // of each block, by the system

size_t most_shared() { return chip.shared_per_sm - kReservedShared; }  // of a block

struct Kernel {
  KernelFacts facts;
  size_t most_shared;  // as last set
};

std::mutex mutex;  // guards the variables below it
std::map<const void*, Kernel> kernels;
std::map<void*, size_t> device_memory, host_memory;  // what is allocated, and its size

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Once a kernel has failed, every call fails.
cudaError_t health() { return result(gpu->error().empty() ? cudaSuccess : cudaErrorLaunchFailure); }

void* allocate(size_t bytes, std::map<void*, size_t>& in) {
  void* p = nullptr;
  if (posix_memalign(&p, kAlignment, bytes) != 0) return nullptr;
  std::memset(p, 0xa5, bytes);
  std::lock_guard<std::mutex> lock(mutex);
  in[p] = bytes;
  return p;
}

// Waits for all kernels first, as the runtime does.
cudaError_t deallocate(void* p, std::map<void*, size_t>& from) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (from.erase(p) == 0) return result(cudaErrorInvalidValue);
  }
  if (gpu) gpu->synchronize();
  std::free(p);
  return cudaSuccess;
}

// The mapped host memory that a kernel's arguments point to, or null.
const void* mapped_memory_of(const void* argument, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [host, size] : host_memory) {
    const void* device = gpu->map(host, size);
    for (size_t i = 0; i + sizeof(device) <= bytes; i += sizeof(device)) {
      if (std::memcmp(static_cast<const std::byte*>(argument) + i, &device, sizeof(device)) == 0)
        return device;
    }
  }
  return nullptr;
}

}  // namespace

size_t allocated_bytes() {
  std::lock_guard<std::mutex> lock(mutex);
  size_t sum = 0;
  for (const auto& [_, bytes] : device_memory) sum += bytes;
  return sum;
}

void know_kernel(const void* kernel, const KernelFacts& facts) {
  std::lock_guard<std::mutex> lock(mutex);
  kernels.insert({kernel, {facts, 48 << 10}});
}

}  // namespace simt

using simt::gpu;
using simt::result;

extern "C" {

// -- errors
// ------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    default:
      return "another error";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  thread_local std::string text;
  text = error == cudaErrorLaunchFailure ? gpu->error() : cudaGetErrorName(error);
  return text.c_str();
}

// -- devices
// -----------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  *p = {};
  std::snprintf(p->name, sizeof(p->name), "simulated GPU");
  p->major = simt::chip.major;
  p->multiProcessorCount = simt::kSms;
  p->totalGlobalMem = size_t{1} << 30;
  p->sharedMemPerMultiprocessor = simt::chip.shared_per_sm;
  p->sharedMemPerBlockOptin = simt::most_shared();
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = simt::peers_reach_each_other;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return result(cudaErrorPeerAccessAlreadyEnabled); }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = simt::driver_function(name);
  *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// -- memory
// ------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (simt::would_spoil_a_capture()) return result(cudaErrorStreamCaptureUnsupported);
  *p = simt::allocate(bytes, simt::device_memory);
  return result(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void* p) {
  if (simt::would_spoil_a_capture()) return result(cudaErrorStreamCaptureUnsupported);
  return p ? simt::deallocate(p, simt::device_memory) : cudaSuccess;
}

cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  if (simt::would_spoil_a_capture()) return result(cudaErrorStreamCaptureUnsupported);
  *p = simt::allocate(bytes, simt::host_memory);
  return result(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  std::lock_guard<std::mutex> lock(simt::mutex);
  const auto found = simt::host_memory.find(host);
  if (found == simt::host_memory.end()) return result(cudaErrorInvalidValue);
  *device = gpu->map(host, found->second);
  gpu->renew(host);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* p) {
  if (simt::would_spoil_a_capture()) return result(cudaErrorStreamCaptureUnsupported);
  if (gpu) {
    gpu->synchronize();
    gpu->unmap(p);
  }
  return simt::deallocate(p, simt::host_memory);
}

// -- streams
// -----------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static std::atomic<int> streams{0};
  *stream = new CUstream_st{++streams, nullptr, 0};
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (simt::would_spoil_a_capture()) return result(cudaErrorStreamCaptureUnsupported);
  if (simt::is_captured(stream)) return result(cudaErrorStreamCaptureUnsupported);
  if (simt::health() != cudaSuccess) return cudaErrorLaunchFailure;
  simt::hand_over(stream);
  return result(gpu->idle(simt::number_of(stream)) ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (simt::would_spoil_a_capture()) return result(cudaErrorStreamCaptureUnsupported);
  if (simt::is_captured(stream)) return result(cudaErrorStreamCaptureUnsupported);
  simt::hand_over(stream);
  gpu->synchronize(simt::number_of(stream));
  return simt::health();
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (!gpu) return result(cudaErrorInvalidResourceHandle);  // a lease that outlives its world
  if (simt::capture_record(event, stream)) return cudaSuccess;
  simt::launch(stream, 1, 1, 0, [reached = event->reached, when = event->when, number = ++event->records] {
    *when = simt::clock_ns();
    simt::store_release(reached.get(), number);
  });
  return simt::health();
}

cudaError_t cudaDeviceSynchronize() {
  if (simt::would_spoil_a_capture()) return result(cudaErrorStreamCaptureUnsupported);
  simt::hand_over_all();
  gpu->synchronize();
  return simt::health();
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (simt::would_spoil_a_capture()) return result(cudaErrorStreamCaptureUnsupported);
  if (event->capture) return result(cudaErrorCapturedEvent);
  const uint64_t reached = __atomic_load_n(event->reached.get(), __ATOMIC_ACQUIRE);
  return result(reached >= event->records ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  while (const cudaError_t asked = cudaEventQuery(event)) {
    if (asked != cudaErrorNotReady) return asked;
    if (const cudaError_t error = simt::health()) return error;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begun, cudaEvent_t ended) {
  if (begun->records == 0 || ended->records == 0) return result(cudaErrorInvalidResourceHandle);
  for (const cudaEvent_t event : {begun, ended}) {
    if (const cudaError_t error = cudaEventQuery(event)) return error;
  }
  *ms = static_cast<float>(static_cast<double>(*ended->when) - static_cast<double>(*begun->when)) / 1e6f;
  return cudaSuccess;
}

// A kernel of one thread that looks now and then.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (event->capture || simt::is_captured(stream)) return result(simt::capture_wait(event, stream));
  simt::launch(stream, 1, 1, 0, [reached = event->reached, number = event->records.load()] {
    while (simt::load_acquire(reached.get()) < number) simt::nanosleep(1000);
  });
  return simt::health();
}

// A kernel of one thread. Words arrive whole.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (simt::is_captured(stream)) return result(cudaErrorStreamCaptureUnsupported);
  simt::launch(stream, 1, 1, 0, [=] {
    size_t i = 0;
    for (; i + sizeof(uint64_t) <= bytes; i += sizeof(uint64_t)) {
      uint64_t word;
      std::memcpy(&word, static_cast<const std::byte*>(from) + i, sizeof(word));
      simt::store_release(reinterpret_cast<uint64_t*>(static_cast<std::byte*>(to) + i), word);
    }
    std::memcpy(static_cast<std::byte*>(to) + i, static_cast<const std::byte*>(from) + i, bytes - i);
  });
  return simt::health();
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (simt::is_captured(stream)) return result(cudaErrorStreamCaptureUnsupported);
  simt::launch(stream, 1, 1, 0, [=] { std::memset(to, value, bytes); });
  return simt::health();
}

// -- kernels
// -----------------------------------------------------------------------------------------------------

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  const bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (!known || static_cast<size_t>(value) > simt::most_shared()) return result(cudaErrorInvalidValue);
  std::lock_guard<std::mutex> lock(simt::mutex);
  simt::kernels.at(kernel).most_shared = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared_bytes) {
  const auto by_memory = static_cast<int>(simt::chip.shared_per_sm / (shared_bytes + simt::kReservedShared));
  *blocks = std::min(by_memory, 2048 / threads);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* address, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  if (std::exchange(simt::next_launch_fails, false)) return result(cudaErrorLaunchOutOfResources);
  simt::Kernel kernel;
  {
    std::lock_guard<std::mutex> lock(simt::mutex);
    const auto found = simt::kernels.find(address);
    if (found == simt::kernels.end()) return result(cudaErrorInvalidDeviceFunction);
    kernel = found->second;
  }
  if (shared_bytes > kernel.most_shared || grid.x > simt::kSms) return result(cudaErrorInvalidValue);
  const auto* given = static_cast<const std::byte*>(arguments[0]);
  const auto argument = std::make_shared<std::vector<std::byte>>(given, given + kernel.facts.argument_bytes);
  const auto start = [=](cudaStream_t on) {
    simt::launch(
        on, grid.x, block.x, shared_bytes, [=] { kernel.facts.call(address, argument->data()); },
        simt::mapped_memory_of(argument->data(), kernel.facts.argument_bytes));
    return simt::health();
  };
  return simt::capture(stream, start) ? cudaSuccess : start(stream);
}

}  // extern "C"
