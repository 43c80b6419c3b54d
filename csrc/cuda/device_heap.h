// The symmetric heap on GPUs: one region of device memory on each rank, which the GPUs of all ranks map.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace commlib::cuda {

// How a region reaches other processes: by a file descriptor or a fabric handle of virtual memory
// (cuMemCreate), or, where the device has neither, not at all.
enum class Share : uint8_t { fd = 0, fabric = 1, none = 2 };
Share share_named(const std::string& name);

// Throws std::runtime_error unless kernels on `device` can load and store in the memory of `owner`.
void require_peer_access(int device, int owner);
// The same for the GPU that has this UUID, as far as this process sees it: CUDA_VISIBLE_DEVICES may hide it.
void require_peer_access(int device, const std::string& uuid);

class DeviceRegion {
 public:
  // Memory of this process on `device`, of the pool (pool.h): contents undefined. It is not used again while
  // it has an owner; for ranks of other processes, which are not owners, see keep_until().
  static std::shared_ptr<DeviceRegion> create(int device, size_t bytes, Share share);
  // The region that a rank described by handle() and fd(), for use by `device`. `fd`: one of this process,
  // which stays the caller's and may be closed at any time; -1 for the other kinds. A region that this
  // process already has or maps is shared.
  static std::shared_ptr<DeviceRegion> open(int device, int64_t owner_pid, int fd, const std::string& handle,
                                            size_t bytes);

  virtual ~DeviceRegion() = default;
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }
  const std::string& handle() const { return handle_; }

 protected:
  DeviceRegion(int device, size_t bytes) : device_(device), bytes_(bytes) {}
  // Lets another device of this process use the memory too.
  virtual void allow(int device) = 0;
  static std::shared_ptr<DeviceRegion> pooled_region(int device, const std::string& name,
                                                     const std::function<DeviceRegion*()>& make);
  static std::shared_ptr<DeviceRegion> open_own(int device, uint64_t number);

  int device_;
  size_t bytes_;
  std::byte* data_ = nullptr;
  int fd_ = -1;
  std::string handle_;  // kind, number within the process, then what the kind needs
};

}  // namespace commlib::cuda
