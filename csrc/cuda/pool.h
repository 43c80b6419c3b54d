// Memory and streams outlive the communicators that used them: no destructor frees anything.
//
// cudaFree and its like wait for all work on the device. There a kernel of another rank may be waiting for
// this one: for the thread that frees, or for another that wants the interpreter's lock, which the freeing
// thread may hold, because a destructor runs wherever the garbage collector does. So what a communicator
// gives back is kept for the next that asks for the same, and freed where no kernel can be waiting: see
// free_idle().
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

namespace commlib::cuda {

// An idle thing of this name, or a new one. Its last owner gives it back to the pool, and must have no
// kernels in flight that use it. If `make` throws, what is idle is freed, whatever waits, before it is tried
// once more: waiting until operations give up at their deadline is better than failing.
std::shared_ptr<void> pooled(int device, const std::string& name, const std::function<void*()>& make,
                             void (*free)(void*));

// Contents are undefined. Making new memory (cudaMalloc, cudaHostAlloc) may have to wait for kernels that
// run. They wait for this rank at most until their deadline, and all ranks of a communicator make it at the
// same time.
using Memory = std::shared_ptr<std::byte>;
Memory device_memory(int device, size_t bytes);
Memory mapped_memory(int device, size_t bytes);  // of the host, and pinned

// A stream that has no other user, and never waits for another such stream. It must be given back idle.
// Streams are never destroyed: PyTorch's allocator may hold one that record_stream() named. PyTorch's own
// streams come from a pool of 32, so the 33rd communicator would share one with another, and the two could
// wait for each other in it.
using Stream = std::shared_ptr<CUstream_st>;
Stream side_stream(int device);
Stream comm_stream(int device);  // of the highest priority
int highest_priority();          // on the current device
bool is_idle(cudaStream_t stream);

// Keeps `what`, which others may still use, until `done`. Asked whenever something is taken from the pool.
void keep_until(std::shared_ptr<void> what, std::function<bool()> done);

// Lets go of what is done.
void drop_what_is_done();

// While one lives, a kernel on `device` may wait for another rank of this process.
class SharedDevice {
 public:
  explicit SharedDevice(int device);
  ~SharedDevice();
  SharedDevice(const SharedDevice&) = delete;
  SharedDevice& operator=(const SharedDevice&) = delete;

 private:
  const int device_;
};

// Frees what is idle, unless a SharedDevice lives. If none does, the kernels that it may wait for wait only
// for ranks of other processes, and these for kernels that this process has launched, not for the calling
// thread. Call it without the interpreter's lock, and between two meetings of all ranks, so that no rank
// meanwhile launches what would have to wait for this one.
void free_idle(int device);

}  // namespace commlib::cuda
