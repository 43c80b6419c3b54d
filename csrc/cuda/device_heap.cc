#include "cuda/device_heap.h"

#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda/driver.h"

namespace commlib::cuda {
namespace {

constexpr const char* kOutOfMemory =
    "Lower max_tokens, capacity or slots: a rank's heap is slots * capacity rows, all of it in device "
    "memory.";
constexpr const char* kUnreachable =
    "Every GPU must reach the memory of every other (NVLink, or PCIe without an IOMMU in between): see "
    "nvidia-smi topo -p2p r.";
constexpr const char* kNoAtomics =
    "Ranks count each other's arrivals in peers' memory, which PCIe alone may not let them: see nvidia-smi "
    "topo "
    "-p2p a. Such GPUs can be nodes of their own (ranks_per_node=1), with UCX in between.";

// What ranks tell each other of a region.
struct Handle {
  Share share;
  uint8_t padding[7];
  uint64_t number;  // within the owner's process
  union {
    CUmemFabricHandle fabric;
    cudaIpcMemHandle_t ipc;
  };
};

Handle parse(const std::string& text) {
  Handle h;
  if (text.size() != sizeof h) throw std::runtime_error("a rank sent a heap handle that is none");
  std::memcpy(&h, text.data(), sizeof h);
  return h;
}

// Regions that this process created, for its in-process ranks.
std::mutex own_mutex;
std::map<uint64_t, std::weak_ptr<DeviceRegion>> own_regions;
uint64_t regions_created = 0;

uint64_t next_number() {
  std::lock_guard<std::mutex> lock(own_mutex);
  return ++regions_created;
}

// Memory of cuMemCreate.
class VirtualRegion : public DeviceRegion {
 public:
  VirtualRegion(int device, size_t bytes, Share share) : DeviceRegion(device, bytes) {
    const CUmemAllocationProp prop = properties(share);
    check(driver().mem_create(&allocation_, mapped_, &prop, 0), "cuMemCreate", kOutOfMemory);
    map();
    Handle h{};
    h.share = share;
    h.number = next_number();
    if (share == Share::fd) {
      check(driver().mem_export(&fd_, allocation_, prop.requestedHandleTypes, 0),
            "cuMemExportToShareableHandle");
    } else {
      check(driver().mem_export(&h.fabric, allocation_, prop.requestedHandleTypes, 0),
            "cuMemExportToShareableHandle", "Is nvidia-imex running?");
    }
    handle_.assign(reinterpret_cast<const char*>(&h), sizeof h);
  }

  // Another process's; `imported` names it as `share` wants.
  VirtualRegion(int device, size_t bytes, Share share, void* imported) : DeviceRegion(device, bytes) {
    const CUmemAllocationProp prop = properties(share);
    check(driver().mem_import(&allocation_, imported, prop.requestedHandleTypes),
          "cuMemImportFromShareableHandle", kUnreachable);
    map();
  }

  ~VirtualRegion() override {
    if (data_) driver().mem_unmap(address(), mapped_);
    if (reserved_) driver().mem_address_free(reserved_, mapped_);
    if (allocation_) driver().mem_release(allocation_);
    if (fd_ >= 0) close(fd_);
  }

 private:
  // How the memory is to be made; sets mapped_ to the size that such memory comes in.
  CUmemAllocationProp properties(Share share) {
    CUmemAllocationProp prop{};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device_}};
    prop.requestedHandleTypes =
        share == Share::fd ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_FABRIC;
    size_t granularity = 0;
    check(driver().mem_granularity(&granularity, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
          "cuMemGetAllocationGranularity");
    mapped_ = (bytes_ + granularity - 1) / granularity * granularity;
    return prop;
  }
  CUdeviceptr address() const { return reinterpret_cast<CUdeviceptr>(data_); }

  void map() {
    check(driver().mem_address_reserve(&reserved_, mapped_, 0, 0, 0), "cuMemAddressReserve");
    check(driver().mem_map(reserved_, mapped_, 0, allocation_, 0), "cuMemMap");
    data_ = reinterpret_cast<std::byte*>(reserved_);
    allow(device_);
  }
  void allow(int device) override {
    const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, {device}}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    check(driver().mem_set_access(address(), mapped_, &access, 1), "cuMemSetAccess", kUnreachable);
  }

  CUmemGenericAllocationHandle allocation_ = 0;
  CUdeviceptr reserved_ = 0;
  size_t mapped_ = 0;
};

// Memory of cudaMalloc.
class IpcRegion : public DeviceRegion {
 public:
  IpcRegion(int device, size_t bytes) : DeviceRegion(device, bytes), owner_(true) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), bytes), "cudaMalloc", kOutOfMemory);
    Handle h{};
    h.share = Share::ipc;
    h.number = next_number();
    check(cudaIpcGetMemHandle(&h.ipc, data_), "cudaIpcGetMemHandle");
    handle_.assign(reinterpret_cast<const char*>(&h), sizeof h);
  }
  IpcRegion(int device, size_t bytes, cudaIpcMemHandle_t handle)
      : DeviceRegion(device, bytes), owner_(false) {
    check(cudaIpcOpenMemHandle(reinterpret_cast<void**>(&data_), handle, cudaIpcMemLazyEnablePeerAccess),
          "cudaIpcOpenMemHandle", kUnreachable);
  }
  ~IpcRegion() override {
    if (owner_) {
      cudaFree(data_);
    } else {
      cudaIpcCloseMemHandle(data_);
    }
  }

 private:
  void allow(int device) override {
    const OnDevice guard(device);
    const cudaError_t error = cudaDeviceEnablePeerAccess(device_, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();
      return;
    }
    check(error, "cudaDeviceEnablePeerAccess", kUnreachable);
  }
  bool owner_;
};

}  // namespace

void require_peer_access(int device, int owner) {
  if (device == owner) return;
  const std::string gpus[] = {"GPU " + std::to_string(device), "GPU " + std::to_string(owner)};
  int can = 0;
  check(cudaDeviceCanAccessPeer(&can, device, owner), "cudaDeviceCanAccessPeer");
  if (!can)
    throw std::runtime_error(gpus[0] + " cannot reach the memory of " + gpus[1] + ". " + kUnreachable);
  check(cudaDeviceGetP2PAttribute(&can, cudaDevP2PAttrNativeAtomicSupported, device, owner),
        "cudaDeviceGetP2PAttribute");
  if (!can)
    throw std::runtime_error(gpus[0] + " has no native atomics in the memory of " + gpus[1] + ". " +
                             kNoAtomics);
}

void require_peer_access(int device, const std::string& uuid) {
  const int owner = device_with(uuid);
  if (owner >= 0) require_peer_access(device, owner);
}

Share share_named(const std::string& name) {
  if (name == "fd") return Share::fd;
  if (name == "fabric") return Share::fabric;
  if (name == "ipc") return Share::ipc;
  throw std::invalid_argument("heaps are shared by \"fd\", \"fabric\" or \"ipc\", not \"" + name + "\"");
}

std::shared_ptr<DeviceRegion> DeviceRegion::create(int device, size_t bytes, Share share) {
  const OnDevice guard(device);
  check(cudaFree(nullptr), "cudaFree", "The device's context could not be made.");
  std::shared_ptr<DeviceRegion> region;
  if (share == Share::ipc) {
    region = std::make_shared<IpcRegion>(device, bytes);
  } else {
    region = std::make_shared<VirtualRegion>(device, bytes, share);
  }
  std::lock_guard<std::mutex> lock(own_mutex);
  own_regions[parse(region->handle_).number] = region;
  return region;
}

std::shared_ptr<DeviceRegion> DeviceRegion::open(int device, int64_t owner_pid, int fd,
                                                 const std::string& handle, size_t bytes) {
  const OnDevice guard(device);
  Handle h = parse(handle);
  if (owner_pid == getpid()) {
    std::lock_guard<std::mutex> lock(own_mutex);
    const auto found = own_regions.find(h.number);
    auto region = found == own_regions.end() ? nullptr : found->second.lock();
    if (!region)
      throw std::runtime_error("a rank of this process closed its communicator while others opened it");
    if (region->device_ != device) {
      require_peer_access(device, region->device_);
      region->allow(device);
    }
    return region;
  }
  switch (h.share) {
    case Share::fd:
      return std::make_shared<VirtualRegion>(device, bytes, h.share,
                                             reinterpret_cast<void*>(static_cast<intptr_t>(fd)));
    case Share::fabric:
      return std::make_shared<VirtualRegion>(device, bytes, h.share, &h.fabric);
    case Share::ipc:
      break;
  }
  return std::make_shared<IpcRegion>(device, bytes, h.ipc);
}

}  // namespace commlib::cuda
