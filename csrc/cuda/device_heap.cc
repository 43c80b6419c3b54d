#include "cuda/device_heap.h"

#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>

#include "cuda/driver.h"
#include "cuda/pool.h"

namespace commlib::cuda {
namespace {

constexpr const char* kOutOfMemory =
    "Lower max_tokens, capacity or slots: a rank's heap is slots * capacity rows, all of it in device "
    "memory.";
constexpr const char* kUnreachable =
    "Every GPU must reach the memory of every other (NVLink, or PCIe without an IOMMU in between): see "
    "nvidia-smi topo -p2p r. Others can be nodes of their own (ranks_per_node=1), with UCX in between.";

constexpr const char* kNotShared =
    "ranks in several processes need GPUs whose memory one process can share with another by file descriptor "
    "or "
    "fabric handle (cuMemCreate), and one of these GPUs cannot. Ranks of one process (run_ranks) do without.";

// What ranks tell each other about a region.
struct Handle {
  Share share;
  uint8_t padding[7];
  uint64_t number;
  CUmemFabricHandle fabric;
};

Handle parse(const std::string& text) {
  Handle h;
  if (text.size() != sizeof h) throw std::runtime_error("a rank sent a heap handle that is none");
  std::memcpy(&h, text.data(), sizeof h);
  return h;
}

// Regions that ranks of this process have now, for one another; and mapped regions of other processes.
std::mutex known_mutex;
using Known = std::map<uint64_t, std::weak_ptr<DeviceRegion>>;
Known own_regions, mapped_regions;  // by number

// No two regions have the same number, whichever process made them, and whenever.
uint64_t new_number() {
  static std::random_device random;
  std::lock_guard<std::mutex> lock(known_mutex);
  return static_cast<uint64_t>(random()) << 32 | random();
}

std::shared_ptr<DeviceRegion> find(const Known& known, uint64_t number) {
  std::lock_guard<std::mutex> lock(known_mutex);
  const auto found = known.find(number);
  return found == known.end() ? nullptr : found->second.lock();
}

void remember(Known& known, uint64_t number, const std::shared_ptr<DeviceRegion>& region) {
  std::lock_guard<std::mutex> lock(known_mutex);
  for (auto it = known.begin(); it != known.end();) it = it->second.expired() ? known.erase(it) : ++it;
  known[number] = region;
}

// Memory of cuMemCreate.
class VirtualRegion : public DeviceRegion {
 public:
  VirtualRegion(int device, size_t bytes, Share share) : VirtualRegion(device, bytes) {
    const CUmemAllocationProp prop = properties(share);
    check(driver().mem_create(&allocation_, mapped_, &prop, 0), "cuMemCreate", kOutOfMemory);
    map();
    Handle h{};
    h.share = share;
    h.number = new_number();
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
  VirtualRegion(int device, size_t bytes, Share share, void* imported) : VirtualRegion(device, bytes) {
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
  // The constructors above build on it, so that they clean up if they throw.
  VirtualRegion(int device, size_t bytes) : DeviceRegion(device, bytes) {}

  // How the memory is to be made; sets mapped_ to the size that such memory comes in.
  CUmemAllocationProp properties(Share share) {
    CUmemAllocationProp prop{};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, device_};
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
    const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, device}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    check(driver().mem_set_access(address(), mapped_, &access, 1), "cuMemSetAccess", kUnreachable);
  }

  CUmemGenericAllocationHandle allocation_ = 0;
  CUdeviceptr reserved_ = 0;
  size_t mapped_ = 0;
};

// Memory of cudaMalloc, for ranks of this process.
class PlainRegion : public DeviceRegion {
 public:
  PlainRegion(int device, size_t bytes) : DeviceRegion(device, bytes) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), bytes), "cudaMalloc", kOutOfMemory);
    Handle h{};
    h.share = Share::none;
    h.number = new_number();
    handle_.assign(reinterpret_cast<const char*>(&h), sizeof h);
  }
  ~PlainRegion() override { cudaFree(data_); }

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
};

}  // namespace

void require_peer_access(int device, int owner) {
  if (device == owner) return;
  const std::string gpus[] = {"GPU " + std::to_string(device), "GPU " + std::to_string(owner)};
  int can = 0;
  check(cudaDeviceCanAccessPeer(&can, device, owner), "cudaDeviceCanAccessPeer");
  if (!can)
    throw std::runtime_error(gpus[0] + " cannot reach the memory of " + gpus[1] + ". " + kUnreachable);
}

void require_peer_access(int device, const std::string& uuid) {
  const int owner = device_with(uuid);
  if (owner >= 0) require_peer_access(device, owner);
}

Share share_named(const std::string& name) {
  if (name == "fd") return Share::fd;
  if (name == "fabric") return Share::fabric;
  if (name == "none") return Share::none;
  throw std::invalid_argument("heaps are shared by \"fd\", \"fabric\" or \"none\", not \"" + name + "\"");
}

std::shared_ptr<DeviceRegion> DeviceRegion::pooled_region(int device, const std::string& name,
                                                          const std::function<DeviceRegion*()>& make) {
  return std::static_pointer_cast<DeviceRegion>(
      pooled(device, name, make, [](void* r) { delete static_cast<DeviceRegion*>(r); }));
}

std::shared_ptr<DeviceRegion> DeviceRegion::create(int device, size_t bytes, Share share) {
  const OnDevice guard(device);
  check(cudaFree(nullptr), "cudaFree", "The device's context could not be made.");
  const std::string name = "region " + std::to_string(static_cast<int>(share)) + " " + std::to_string(bytes);
  auto region = pooled_region(device, name, [&]() -> DeviceRegion* {
    if (share == Share::none) return new PlainRegion(device, bytes);
    return new VirtualRegion(device, bytes, share);
  });
  remember(own_regions, parse(region->handle_).number, region);
  return region;
}

std::shared_ptr<DeviceRegion> DeviceRegion::open_own(int device, uint64_t number) {
  auto region = find(own_regions, number);
  if (!region)
    throw std::runtime_error("a rank of this process closed its communicator while others opened it");
  if (region->device_ != device) {
    require_peer_access(device, region->device_);
    region->allow(device);
  }
  return region;
}

std::shared_ptr<DeviceRegion> DeviceRegion::open(int device, int64_t owner_pid, int fd,
                                                 const std::string& handle, size_t bytes) {
  Handle h = parse(handle);
  if (owner_pid == getpid()) return open_own(device, h.number);
  if (h.share == Share::none) throw std::runtime_error(kNotShared);
  const OnDevice guard(device);
  auto region = find(mapped_regions, h.number);
  if (!region || region->device_ != device) {
    region = pooled_region(device, "mapped region " + std::to_string(h.number), [&]() -> DeviceRegion* {
      void* file = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
      return new VirtualRegion(device, bytes, h.share, h.share == Share::fd ? file : &h.fabric);
    });
    remember(mapped_regions, h.number, region);
  }
  return region;
}

}  // namespace commlib::cuda
