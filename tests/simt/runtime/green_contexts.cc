// Green contexts: a share of the SMs is a number, and its streams are like all others.
#include <cuda.h>

#include "simt/runtime/cudart.h"
#include "simt/runtime/driver.h"

namespace simt {
namespace {

constexpr unsigned kCluster = 8;  // SMs that are given out together, unless the flags say otherwise

// Descriptions and contexts only have to differ from null.
template <class Handle>
CUresult give_any(Handle* handle) {
  static char any;
  *handle = reinterpret_cast<Handle>(&any);
  return CUDA_SUCCESS;
}

CUresult get_resource(CUdevice, CUdevResource* all, CUdevResourceType type) {
  all->type = type;
  all->sm.smCount = kSms;
  return CUDA_SUCCESS;
}

CUresult split(CUdevResource* part, unsigned* groups, const CUdevResource* all, CUdevResource* rest,
               unsigned flags, unsigned least) {
  const unsigned unit = flags & CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING ? 2 : kCluster;
  const unsigned count = (least + unit - 1) / unit * unit;
  if (*groups != 1 || count > all->sm.smCount) return CUDA_ERROR_INVALID_VALUE;
  *part = *rest = *all;
  part->sm.smCount = count;
  rest->sm.smCount -= count;
  return CUDA_SUCCESS;
}

CUresult describe(CUdevResourceDesc* description, CUdevResource*, unsigned) { return give_any(description); }
CUresult create(CUgreenCtx* context, CUdevResourceDesc, CUdevice, unsigned) { return give_any(context); }
CUresult destroy(CUgreenCtx) { return CUDA_SUCCESS; }

CUresult create_stream(CUstream* stream, CUgreenCtx, unsigned flags, int priority) {
  cudaStreamCreateWithPriority(stream, flags, priority);
  return CUDA_SUCCESS;
}

}  // namespace

std::vector<DriverFunction> green_context_functions() {
  return {named("cuDeviceGetDevResource", get_resource), named("cuDevSmResourceSplitByCount", split),
          named("cuDevResourceGenerateDesc", describe),  named("cuGreenCtxCreate", create),
          named("cuGreenCtxDestroy", destroy),           named("cuGreenCtxStreamCreate", create_stream)};
}

}  // namespace simt
