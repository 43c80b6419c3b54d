// What only NVML knows of a GPU. libnvidia-ml is opened on first use; without it nothing is known.
#pragma once

#include <string>

namespace commlib::cuda {

// NVML's answer about the NVLink fabric of a GPU: nvmlGpuFabricInfo_v2_t.
struct FabricInfo {
  unsigned version;
  unsigned char cluster[16];  // UUID; all zero: a GPU whose NVLinks end on its host
  int status;                 // of the registration, once it is completed; 0: success
  unsigned clique;            // only GPUs of one clique of a cluster reach each other
  unsigned char state;        // of the registration
  unsigned health;
};
constexpr unsigned char kFabricCompleted = 3;

// What GPUs of one NVLink domain, and no others, have in common; "" for a GPU that is in none.
std::string domain_key(const FabricInfo& info);

// The key of a GPU, by its PCI address. "" also if NVML is missing, or older than this question.
std::string domain_of(int pci_domain, int pci_bus, int pci_device);

}  // namespace commlib::cuda
