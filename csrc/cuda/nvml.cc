#include "cuda/nvml.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <iterator>

namespace commlib::cuda {
namespace {

using Device = struct nvmlDevice_st*;
constexpr int kSuccess = 0;
static_assert(sizeof(FabricInfo) == 36, "as NVML lays it out, for the size is part of the version");

struct Nvml {
  int (*init)() = nullptr;
  int (*device)(const char* pci, Device* device) = nullptr;
  int (*fabric)(Device device, FabricInfo* info) = nullptr;
  bool ready = false;
};

template <class Fn>
bool find(void* library, const char* name, Fn* fn) {
  *fn = reinterpret_cast<Fn>(dlsym(library, name));
  return *fn != nullptr;
}

// Stays open, and initialised, as long as the process lives: others use it too.
Nvml open_nvml() {
  Nvml n;
  void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  n.ready = library && find(library, "nvmlInit_v2", &n.init) &&
            find(library, "nvmlDeviceGetHandleByPciBusId_v2", &n.device) &&
            find(library, "nvmlDeviceGetGpuFabricInfoV", &n.fabric) && n.init() == kSuccess;
  return n;
}

std::string hex(const unsigned char* bytes, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", bytes[i]);
    text += two;
  }
  return text;
}

}  // namespace

std::string domain_key(const FabricInfo& info) {
  const bool registered = info.state == kFabricCompleted && info.status == kSuccess;
  const bool real = std::any_of(std::begin(info.cluster), std::end(info.cluster), [](auto c) { return c; });
  if (!registered || !real) return "";
  return hex(info.cluster, sizeof info.cluster) + "/" + std::to_string(info.clique);
}

std::string domain_of(int pci_domain, int pci_bus, int pci_device) {
  static const Nvml nvml = open_nvml();
  if (!nvml.ready) return "";
  char address[32];
  std::snprintf(address, sizeof address, "%08x:%02x:%02x.0", pci_domain, pci_bus, pci_device);
  Device device = nullptr;
  FabricInfo info{};
  info.version = sizeof info | 2u << 24;
  if (nvml.device(address, &device) != kSuccess) return "";
  return nvml.fabric(device, &info) == kSuccess ? domain_key(info) : "";
}

}  // namespace commlib::cuda
