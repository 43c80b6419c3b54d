#include "cuda/driver.h"

#include <cstdio>
#include <stdexcept>

#include "cuda/nvml.h"

namespace commlib::cuda {
namespace {

std::string message(const char* call, const char* name, const char* text, const char* hint) {
  std::string s = std::string(call) + " failed: " + name + " (" + text + ")";
  return *hint ? s + ". " + hint : s;
}

// Looks up a driver function; status and pointer are initialised, because an old runtime does not set them.
template <class Fn>
void find_newer(const char* name, unsigned version, Fn* fn) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &status), name,
        "Is the NVIDIA driver installed?");
  *fn = status == cudaDriverEntryPointSuccess ? reinterpret_cast<Fn>(found) : nullptr;
}

template <class Fn>
void find(const char* name, unsigned version, Fn* fn) {
  find_newer(name, version, fn);
  if (*fn) return;
  throw std::runtime_error(std::string("the NVIDIA driver has no ") + name +
                           ": it is too old for this version of commlib");
}

Driver find_all() {
  Driver d{};
  find("cuGetErrorName", 6000, &d.get_error_name);
  find("cuGetErrorString", 6000, &d.get_error_string);
  find("cuDeviceGetAttribute", 2000, &d.device_get_attribute);
  find("cuMemAddressFree", 10020, &d.mem_address_free);
  find("cuMemAddressReserve", 10020, &d.mem_address_reserve);
  find("cuMemCreate", 10020, &d.mem_create);
  find("cuMemExportToShareableHandle", 10020, &d.mem_export);
  find("cuMemGetAllocationGranularity", 10020, &d.mem_granularity);
  find("cuMemImportFromShareableHandle", 10020, &d.mem_import);
  find("cuMemMap", 10020, &d.mem_map);
  find("cuMemRelease", 10020, &d.mem_release);
  find("cuMemSetAccess", 10020, &d.mem_set_access);
  find("cuMemUnmap", 10020, &d.mem_unmap);
  find("cuStreamWaitValue64", 11070, &d.stream_wait_value);
  find_newer("cuDeviceGetDevResource", 12040, &d.device_get_resource);
  find_newer("cuDevResourceGenerateDesc", 12040, &d.resource_describe);
  find_newer("cuDevSmResourceSplitByCount", 12040, &d.resource_split);
  find_newer("cuGreenCtxDestroy", 12040, &d.green_context_destroy);
  find_newer("cuGreenCtxStreamCreate", 12050, &d.green_context_stream);
  if (d.green_context_stream) find_newer("cuGreenCtxCreate", 12040, &d.green_context_create);
  return d;
}

bool attribute(CUdevice_attribute which, int device) {
  int value = 0;
  check(driver().device_get_attribute(&value, which, device), "cuDeviceGetAttribute");
  return value != 0;
}

cudaDeviceProp properties_of(int device) {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties", "Is there such a device?");
  return p;
}

std::string uuid_of(const cudaDeviceProp& p) {
  std::string uuid;
  for (const char c : p.uuid.bytes) {
    char hex[3];
    std::snprintf(hex, sizeof hex, "%02x", static_cast<unsigned char>(c));
    uuid += hex;
  }
  return uuid;
}

}  // namespace

void check(cudaError_t error, const char* call, const char* hint) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, and not again by the next call
  throw std::runtime_error(message(call, cudaGetErrorName(error), cudaGetErrorString(error), hint));
}

void check(CUresult error, const char* call, const char* hint) {
  if (error == CUDA_SUCCESS) return;
  const char *name = "unknown", *text = "unknown error";
  driver().get_error_name(error, &name);
  driver().get_error_string(error, &text);
  throw std::runtime_error(message(call, name, text, hint));
}

const Driver& driver() {
  static const Driver found = find_all();
  return found;
}

std::string why_not() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no usable NVIDIA driver or GPU: ") + cudaGetErrorName(error) + " (" +
           cudaGetErrorString(error) + ")";
  }
  if (devices == 0) return "no CUDA device is visible";
  try {
    driver();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "";
}

DeviceFacts facts_of(int device) {
  const cudaDeviceProp p = properties_of(device);
  DeviceFacts f;
  f.name = p.name;
  f.uuid = uuid_of(p);
  f.sms = p.multiProcessorCount;
  f.capability = p.major * 10 + p.minor;
  f.memory = static_cast<int64_t>(p.totalGlobalMem);
  f.shared_per_sm = static_cast<int>(p.sharedMemPerMultiprocessor);
  f.shared_per_block = static_cast<int>(p.sharedMemPerBlockOptin);
  f.shares_fds = attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) &&
                 attribute(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device);
  // NVML first: on most hosts there is no domain, and nothing need be made on the device to see that.
  f.domain = domain_of(p.pciDomainID, p.pciBusID, p.pciDeviceID);
  if (!f.domain.empty() && !makes_fabric_memory(device)) f.domain.clear();
  return f;
}

bool makes_fabric_memory(int device) {
  if (!attribute(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, device)) return false;
  const OnDevice guard(device);
  check(cudaFree(nullptr), "cudaFree", "The device's context could not be made.");
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_FABRIC;
  size_t bytes = 0;  // the least there is: 2 MiB
  CUmemGenericAllocationHandle allocation = 0;
  if (driver().mem_granularity(&bytes, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM) != CUDA_SUCCESS ||
      driver().mem_create(&allocation, bytes, &prop, 0) != CUDA_SUCCESS)
    return false;
  CUmemFabricHandle handle;
  const CUresult exported = driver().mem_export(&handle, allocation, CU_MEM_HANDLE_TYPE_FABRIC, 0);
  driver().mem_release(allocation);
  return exported == CUDA_SUCCESS;
}

int device_with(const std::string& uuid) {
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  for (int device = 0; device < devices; ++device) {
    if (uuid_of(properties_of(device)) == uuid) return device;
  }
  return -1;
}

OnDevice::OnDevice(int device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ == device) {
    before_ = -1;
  } else {
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
}

OnDevice::~OnDevice() {
  cudaThreadExchangeStreamCaptureMode(&mode_);
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace commlib::cuda
