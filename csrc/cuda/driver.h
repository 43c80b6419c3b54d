// The CUDA runtime and driver as commlib uses them. libcuda is opened on first use, so that this loads and
// says what is missing on a machine without a driver.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

namespace commlib::cuda {

// Throws std::runtime_error with the call, the error's name and text, and what to try.
void check(cudaError_t error, const char* call, const char* hint = "");
void check(CUresult error, const char* call, const char* hint = "");

// Driver functions that have no equivalent in the runtime.
struct Driver {
  PFN_cuDeviceGetAttribute_v2000 device_get_attribute;
  PFN_cuGetErrorName_v6000 get_error_name;
  PFN_cuGetErrorString_v6000 get_error_string;
  PFN_cuMemAddressFree_v10020 mem_address_free;
  PFN_cuMemAddressReserve_v10020 mem_address_reserve;
  PFN_cuMemCreate_v10020 mem_create;
  PFN_cuMemExportToShareableHandle_v10020 mem_export;
  PFN_cuMemGetAllocationGranularity_v10020 mem_granularity;
  PFN_cuMemImportFromShareableHandle_v10020 mem_import;
  PFN_cuMemMap_v10020 mem_map;
  PFN_cuMemRelease_v10020 mem_release;
  PFN_cuMemSetAccess_v10020 mem_set_access;
  PFN_cuMemUnmap_v10020 mem_unmap;
  PFN_cuStreamWaitValue64_v11070 stream_wait_value;
  // Null on drivers before CUDA 12.5.
  PFN_cuDeviceGetDevResource_v12040 device_get_resource;
  PFN_cuDevResourceGenerateDesc_v12040 resource_describe;
  PFN_cuDevSmResourceSplitByCount_v12040 resource_split;
  PFN_cuGreenCtxCreate_v12040 green_context_create;
  PFN_cuGreenCtxDestroy_v12040 green_context_destroy;
  PFN_cuGreenCtxStreamCreate_v12050 green_context_stream;
};
const Driver& driver();

// "", or why there is no GPU to work with.
std::string why_not();

struct DeviceFacts {
  std::string name, uuid;
  int sms;
  int capability;  // 90 for 9.0
  int64_t memory;  // bytes
  int shared_per_sm, shared_per_block;
  bool shares_fds;     // of virtual memory
  std::string domain;  // key of the NVLink domain in which it can share memory with other hosts; "": none
};
DeviceFacts facts_of(int device);

// Whether memory with a fabric handle can be made, by making some. The device's attribute is no answer:
// Hopper has it everywhere, and without nvidia-imex making the memory fails.
bool makes_fabric_memory(int device);

// The number of the device that has this UUID (as in DeviceFacts); -1: this process sees none.
int device_with(const std::string& uuid);

// Makes `device` the calling thread's current one, as long as it lives. And lets this thread ask the device,
// and make memory, while CUDA graphs are captured: a capture fails otherwise, another thread's too. What is
// done so concerns no stream that is being captured.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // the thread's, before
};

}  // namespace commlib::cuda
