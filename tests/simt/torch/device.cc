#include "simt/torch/device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <Python.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

#include "simt/runtime/cudart.h"
#include "simt/runtime/host_work.h"

namespace standin {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

thread_local cudaStream_t current = nullptr;

cudaStream_t handle_of(const Stream& stream) { return reinterpret_cast<cudaStream_t>(stream.id()); }
Stream stream_of(cudaStream_t handle) {
  return Stream(Stream::UNSAFE, kDevice, static_cast<c10::StreamId>(reinterpret_cast<intptr_t>(handle)));
}

void check_index(DeviceIndex index) {
  TORCH_CHECK(index <= 0, "CUDA error: invalid device ordinal: the simulated GPU is the only one");
}

// How PyTorch's own C++ code changes streams and orders them: autograd runs backward by it.
class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kDevice.type(); }
  Device exchangeDevice(Device device) const override {
    check_index(device.index());
    return kDevice;
  }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device device) const override { check_index(device.index()); }
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }

  Stream getStream(Device) const override { return stream_of(current); }
  Stream getDefaultStream(Device) const override { return stream_of(nullptr); }
  Stream getStreamFromGlobalPool(Device, bool urgent) const override {
    return stream_of(pooled_stream(urgent));
  }
  Stream getNewStream(Device, int priority) const override { return stream_of(pooled_stream(priority < 0)); }
  Stream exchangeStream(Stream stream) const override {
    return stream_of(std::exchange(current, handle_of(stream)));
  }
  void* getStreamNativeHandle(Stream stream) const override { return handle_of(stream); }
  bool queryStream(const Stream& stream) const override {
    return cudaStreamQuery(handle_of(stream)) == cudaSuccess;
  }
  void synchronizeStream(const Stream& stream) const override {
    check(cudaStreamSynchronize(handle_of(stream)), "cudaStreamSynchronize");
  }
  bool isStreamCapturing(const Stream& stream) const override { return simt::is_captured(handle_of(stream)); }

  void record(void** event, const Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (!*event) {
      cudaEvent_t made = nullptr;
      check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "cudaEventCreateWithFlags");
      *event = made;
    }
    check(cudaEventRecord(static_cast<cudaEvent_t>(*event), handle_of(stream)), "cudaEventRecord");
  }
  void block(void* event, const Stream& stream) const override {
    if (!event) return;
    check(cudaStreamWaitEvent(handle_of(stream), static_cast<cudaEvent_t>(event), 0), "cudaStreamWaitEvent");
  }
  bool queryEvent(void* event) const override {
    return !event || cudaEventQuery(static_cast<cudaEvent_t>(event)) == cudaSuccess;
  }
  void synchronizeEvent(void* event) const override {
    if (event) check(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "cudaEventSynchronize");
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override {
    if (event) cudaEventDestroy(static_cast<cudaEvent_t>(event));
  }
  void synchronizeDevice(DeviceIndex) const override {
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& stream) const override {
    note_use(data, handle_of(stream));
  }
};

// What PyTorch's code for the CPU asks about CUDA.
class Hooks final : public at::CUDAHooksInterface {
 public:
  explicit Hooks(const at::CUDAHooksArgs&) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex index) const override { check_index(index); }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(at::kCPU); }
  at::Allocator* getCUDADeviceAllocator() const override { return &allocator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize(DeviceIndex) const override {
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks);
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &allocator());

// On for as long as the process lives: threads may use it until the end.
struct SwitchedOn {
  SwitchedOn() {
    const char* seed = std::getenv("SIMT_SEED");
    simt::Config config;
    config.seed = seed ? std::strtoull(seed, nullptr, 10) : 1;
    config.max_switches = UINT64_MAX;  // it is on for many tests
    config.time_leaps = false;         // some of which take the time
    simt::gpu = new simt::Gpu(config);
  }
} switched_on;

}  // namespace

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  TORCH_CHECK(false, "CUDA error: ", cudaGetErrorString(error), " (", call, ")");
}

cudaStream_t current_stream() { return current; }
void set_current_stream(cudaStream_t stream) { current = stream; }

// As many as PyTorch has, in turn.
cudaStream_t pooled_stream(bool urgent) {
  constexpr size_t kStreams = 32;
  static const auto make = [] {
    std::array<cudaStream_t, kStreams> streams{};
    for (cudaStream_t& stream : streams) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    return streams;
  };
  static const std::array<cudaStream_t, kStreams> pools[2] = {make(), make()};
  static std::atomic<size_t> next[2];
  return pools[urgent][next[urgent]++ % kStreams];
}

void catch_up_with_current_stream() {
  if (simt::is_captured(current)) return;  // what it has captured does not run
  PyThreadState* const had_lock = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  simt::catch_up(current);
  if (had_lock) PyEval_RestoreThread(had_lock);
  const std::string error = simt::gpu->error();
  TORCH_CHECK(error.empty(), "CUDA error: ", error);
}

}  // namespace standin
