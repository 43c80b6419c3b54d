# The tests of the protocol on a GPU, without the Python module and PyTorch: the first thing to run there.
# Included by the Makefile; works by itself too: `make -f tests/cpp/gpu/gpu.mk -j gpu-cpp`.
CXX ?= g++
PYTHON ?= python3
SEED ?=
# Of the GPU at hand, or of several: "80 90 100".
COMMLIB_CUDA_ARCHS ?= 90
GPU_CPP := build/gpu-cpp
GPU_CPP_PROGRAM := $(GPU_CPP)/protocol-tests
GPU_CPP_ARGS ?=
GPU_CPP_JOBS ?= $(shell nproc)
SANITIZER ?= compute-sanitizer
TOOL ?= memcheck
# Warnings depend on the compiler: errors only with WERROR=-Werror (the Makefile: COMMLIB_WERROR=1).
WERROR ?=
# -ffp-contract=off: the reference's sums have the kernels' bits.
GPU_CPP_FLAGS := -std=c++17 -O2 -g -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra $(WERROR) \
  -Wno-unknown-pragmas -pthread -Icsrc -Itests
gpu_cpp_compile := COMMLIB_CUDA_ARCHS="$(COMMLIB_CUDA_ARCHS)" $(PYTHON) csrc/nvcc.py
GPU_CPP_SOURCES := $(wildcard csrc/backend/*.cc csrc/heap/*.cc) $(filter-out csrc/net/ucx_%,$(wildcard csrc/net/*.cc)) \
  $(filter-out %/partition.cc,$(wildcard csrc/cuda/*.cc)) $(filter-out %/main.cc,$(wildcard tests/cpp/*.cc)) \
  $(wildcard tests/cpp/gpu/*.cc) tests/simt/runtime/test_cuda.cc tests/simt/runtime/test_graphs.cc
GPU_CPP_OBJECTS := $(GPU_CPP_SOURCES:%.cc=$(GPU_CPP)/%.o)
GPU_CPP_KERNELS := $(GPU_CPP)/launch-$(subst $(eval ) ,-,$(COMMLIB_CUDA_ARCHS)).o

.PHONY: gpu-cpp gpu-cpp-program gpu-cpp-build gpu-cpp-sanitize
gpu-cpp: gpu-cpp-program  ## on a GPU: the protocol's tests without PyTorch; GPU_CPP_ARGS="--only two_ranks", SEED=n
	$(GPU_CPP_PROGRAM) $(if $(SEED),--seed $(SEED)) $(GPU_CPP_ARGS)

# compute-sanitizer slows kernels a hundredfold, and deadlines do not wait for it.
gpu-cpp-sanitize: gpu-cpp-program  ## the same under compute-sanitizer, with fewer rounds: TOOL=memcheck, racecheck, synccheck
	$(SANITIZER) --tool $(TOOL) --error-exitcode 9 $(GPU_CPP_PROGRAM) $(if $(SEED),--seed $(SEED)) \
	  --fewer 32 --limit 200 $(GPU_CPP_ARGS)

gpu-cpp-build: gpu-cpp-program  ## that this program builds and reads its arguments, on any machine with nvcc
	sh tests/cpp/gpu/check_arguments.sh $(GPU_CPP_PROGRAM)

gpu-cpp-program:
	@echo "== building the protocol's tests for sm_$(COMMLIB_CUDA_ARCHS): about a minute"
	@$(MAKE) --no-print-directory -j$(GPU_CPP_JOBS) -f tests/cpp/gpu/gpu.mk $(GPU_CPP_PROGRAM) \
	  GPU_CPP_CUDA="$$($(gpu_cpp_compile))"

# Needs no libcuda, which only a machine with a driver has, and of the C++ library only what is linked in.
# -rdynamic, -no-pie: names and addresses for the stacks of a test that hangs.
$(GPU_CPP_PROGRAM): $(GPU_CPP_KERNELS) $(GPU_CPP_OBJECTS)
	@echo "link $@"
	@$(CXX) -pthread -rdynamic -no-pie -static-libstdc++ -Wl,--exclude-libs,libstdc++.a -Wl,--gc-sections -o $@ $^ \
	  -L$(GPU_CPP_CUDA)/lib64 -L$(GPU_CPP_CUDA)/targets/$$(uname -m)-linux/lib -lcudart_static -lrt -ldl

$(GPU_CPP)/launch-%.o: csrc/cuda/launch.cu csrc/nvcc.py $(shell find csrc -name '*.h' -o -name '*.cuh')
	@mkdir -p $(@D)
	@echo "nvcc $<"
	@$(gpu_cpp_compile) $< $@

$(GPU_CPP)/%.o: %.cc tests/cpp/gpu/gpu.mk
	@mkdir -p $(@D)
	@echo "c++ $<"
	@$(CXX) $(GPU_CPP_FLAGS) -isystem $(GPU_CPP_CUDA)/include -MMD -MP -c -o $@ $<

-include $(shell find $(GPU_CPP) -name '*.d' 2>/dev/null)
