#include "cuda/network_memory.h"

#include <cstring>
#include <vector>

#include "cuda/driver.h"

namespace commlib::cuda {
namespace {

class GpuMemory final : public NetworkMemory {
 public:
  GpuMemory(int device, std::byte* control) : device_(device), control_(control) {
    const OnDevice guard(device_);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~GpuMemory() override {
    const OnDevice guard(device_);
    cudaStreamDestroy(stream_);
    for (void* p : rings_) cudaFree(p);
    for (void* p : words_) cudaFreeHost(p);
  }

  bool on_gpu() const override { return true; }
  std::byte* rings(size_t bytes) override {
    const OnDevice guard(device_);
    void* p = nullptr;
    check(cudaMalloc(&p, bytes), "cudaMalloc");
    rings_.push_back(p);
    check(cudaMemsetAsync(p, 0, bytes, stream_), "cudaMemsetAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return static_cast<std::byte*>(p);
  }
  // At the same address on the device (unified addressing, which every 64-bit Linux has).
  std::byte* words(size_t bytes) override {
    const OnDevice guard(device_);
    void* p = nullptr;
    check(cudaHostAlloc(&p, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
    words_.push_back(p);
    std::memset(p, 0, bytes);
    return static_cast<std::byte*>(p);
  }
  // A copy beside the kernels, which wait for these words. Done when it returns.
  void write_control(uint64_t offset, const std::byte* words, uint64_t bytes) override {
    const OnDevice guard(device_);
    check(cudaMemcpyAsync(control_ + offset, words, bytes, cudaMemcpyHostToDevice, stream_),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

 private:
  const int device_;
  std::byte* const control_;
  cudaStream_t stream_ = nullptr;
  std::vector<void*> rings_, words_;
};

}  // namespace

std::unique_ptr<NetworkMemory> gpu_network_memory(int device, std::byte* control) {
  return std::make_unique<GpuMemory>(device, control);
}

}  // namespace commlib::cuda
