#include "cuda/network_memory.h"

#include <cstring>
#include <vector>

#include "cuda/driver.h"
#include "cuda/pool.h"

namespace commlib::cuda {
namespace {

class GpuMemory final : public NetworkMemory {
 public:
  GpuMemory(int device, std::byte* control)
      : device_(device), control_(control), stream_(side_stream(device)) {}

  bool on_gpu() const override { return true; }
  std::byte* own(size_t bytes) override {
    const OnDevice guard(device_);
    memory_.push_back(device_memory(device_, bytes));
    std::byte* p = memory_.back().get();
    check(cudaMemsetAsync(p, 0, bytes, stream_.get()), "cudaMemsetAsync");
    check(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
    return p;
  }
  // At the same address on the device (unified addressing, which every 64-bit Linux has).
  std::byte* words(size_t bytes) override {
    memory_.push_back(mapped_memory(device_, bytes));
    std::memset(memory_.back().get(), 0, bytes);
    return memory_.back().get();
  }
  // Copies beside the kernels, which wait for these words. The copy is done when it returns. The last word
  // comes after the others, which it may announce: a copy by itself has no order.
  void write_control(uint64_t offset, const std::byte* words, uint64_t bytes) override {
    const OnDevice guard(device_);
    const uint64_t before = bytes - sizeof(uint64_t);
    if (before > 0) copy(offset, words, before);
    copy(offset + before, words + before, sizeof(uint64_t));
    check(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
  }

 private:
  void copy(uint64_t offset, const std::byte* words, uint64_t bytes) {
    check(cudaMemcpyAsync(control_ + offset, words, bytes, cudaMemcpyHostToDevice, stream_.get()),
          "cudaMemcpyAsync");
  }

  const int device_;
  std::byte* const control_;
  const Stream stream_;
  std::vector<Memory> memory_;
};

}  // namespace

std::unique_ptr<NetworkMemory> gpu_network_memory(int device, std::byte* control) {
  return std::make_unique<GpuMemory>(device, control);
}

}  // namespace commlib::cuda
