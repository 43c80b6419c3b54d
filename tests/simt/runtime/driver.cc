// Virtual memory as the driver offers it, on memfd and mmap: an allocation is a file, which processes may
// share. And waits of streams for words.
#include "simt/runtime/driver.h"

#include <cuda.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "simt/runtime/cudart.h"
#include "simt/runtime/host_work.h"

namespace simt {

bool has_imex = false;

namespace {

constexpr size_t kGranularity = 64 << 10;

void* at(CUdeviceptr p) { return reinterpret_cast<void*>(p); }
int file_of(CUmemGenericAllocationHandle allocation) { return static_cast<int>(allocation) - 1; }

CUresult allocation_of(int file, CUmemGenericAllocationHandle* allocation) {
  if (file < 0) return CUDA_ERROR_INVALID_VALUE;
  *allocation = static_cast<CUmemGenericAllocationHandle>(file) + 1;
  return CUDA_SUCCESS;
}

CUresult get_error_name(CUresult error, const char** name) {
  *name = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "another error";
  return CUDA_SUCCESS;
}

CUresult get_attribute(int* value, CUdevice_attribute, CUdevice) {
  *value = 1;
  return CUDA_SUCCESS;
}

CUresult mem_granularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = kGranularity;
  return CUDA_SUCCESS;
}

CUresult mem_create(CUmemGenericAllocationHandle* allocation, size_t bytes, const CUmemAllocationProp* prop,
                    unsigned long long) {
  const bool fabric = prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_FABRIC;
  const bool known = fabric || prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  if (fabric && !has_imex) return CUDA_ERROR_NOT_PERMITTED;
  if (!known || bytes % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  const int file = memfd_create("simulated GPU", MFD_CLOEXEC);
  if (file >= 0 && ftruncate(file, static_cast<off_t>(bytes)) != 0) return CUDA_ERROR_INVALID_VALUE;
  return allocation_of(file, allocation);
}

CUresult mem_release(CUmemGenericAllocationHandle allocation) {
  return close(file_of(allocation)) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// A fabric handle is the allocation's own number: valid in this process, while the allocation lives.
CUresult mem_export(void* file, CUmemGenericAllocationHandle allocation, CUmemAllocationHandleType kind,
                    unsigned long long) {
  const int mine = kind == CU_MEM_HANDLE_TYPE_FABRIC ? file_of(allocation) : dup(file_of(allocation));
  std::memcpy(file, &mine, sizeof(mine));
  return mine < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult mem_import(CUmemGenericAllocationHandle* allocation, void* file, CUmemAllocationHandleType kind) {
  int theirs = static_cast<int>(reinterpret_cast<intptr_t>(file));
  if (kind == CU_MEM_HANDLE_TYPE_FABRIC) std::memcpy(&theirs, file, sizeof(theirs));
  return allocation_of(dup(theirs), allocation);
}

CUresult map_at(void* p, size_t bytes, int flags, int file, CUdeviceptr* to) {
  void* got = mmap(p, bytes, PROT_NONE, flags | MAP_NORESERVE, file, 0);
  if (got == MAP_FAILED) return CUDA_ERROR_INVALID_VALUE;
  if (to) *to = reinterpret_cast<CUdeviceptr>(got);
  return CUDA_SUCCESS;
}

CUresult mem_address_reserve(CUdeviceptr* p, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  return map_at(nullptr, bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1, p);
}

CUresult mem_address_free(CUdeviceptr p, size_t bytes) {
  return munmap(at(p), bytes) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult mem_map(CUdeviceptr p, size_t bytes, size_t, CUmemGenericAllocationHandle allocation,
                 unsigned long long) {
  return map_at(at(p), bytes, MAP_SHARED | MAP_FIXED, file_of(allocation), nullptr);
}

CUresult mem_unmap(CUdeviceptr p, size_t bytes) {
  return map_at(at(p), bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, nullptr);
}

CUresult mem_set_access(CUdeviceptr p, size_t bytes, const CUmemAccessDesc*, size_t) {
  return mprotect(at(p), bytes, PROT_READ | PROT_WRITE) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// A kernel of one thread that looks now and then.
CUresult stream_wait_value(CUstream stream, CUdeviceptr p, cuuint64_t value, unsigned flags) {
  if (flags != CU_STREAM_WAIT_VALUE_GEQ || p % sizeof(uint64_t) != 0) return CUDA_ERROR_INVALID_VALUE;
  launch(stream, 1, 1, 0, [=] {
    while (static_cast<int64_t>(load_acquire(static_cast<uint64_t*>(at(p))) - value) < 0) nanosleep(1000);
  });
  return CUDA_SUCCESS;
}

std::vector<DriverFunction> all_functions() {
  std::vector<DriverFunction> all = {
      named("cuGetErrorName", get_error_name),
      named("cuGetErrorString", get_error_name),
      named("cuDeviceGetAttribute", get_attribute),
      named("cuMemAddressFree", mem_address_free),
      named("cuMemAddressReserve", mem_address_reserve),
      named("cuMemCreate", mem_create),
      named("cuMemExportToShareableHandle", mem_export),
      named("cuMemGetAllocationGranularity", mem_granularity),
      named("cuMemImportFromShareableHandle", mem_import),
      named("cuMemMap", mem_map),
      named("cuMemRelease", mem_release),
      named("cuMemSetAccess", mem_set_access),
      named("cuMemUnmap", mem_unmap),
      named("cuStreamWaitValue64", stream_wait_value),
  };
  for (const DriverFunction& f : green_context_functions()) all.push_back(f);
  return all;
}

}  // namespace

void* driver_function(const char* name) {
  static const std::vector<DriverFunction> functions = all_functions();
  for (const DriverFunction& f : functions) {
    if (std::strcmp(f.name, name) == 0) return f.address;
  }
  return nullptr;
}

}  // namespace simt
