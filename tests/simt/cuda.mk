# Where CUDA's headers are, or nothing. Included by simt.mk and torch/torch.mk.
SIMT_CUDA := $(firstword $(foreach home,$(CUDA_HOME) $(CUDA_PATH) \
  $(abspath $(dir $(realpath $(shell command -v nvcc 2>/dev/null)))..) /usr/local/cuda,\
  $(if $(wildcard $(home)/include/cuda_runtime_api.h),$(home))))
