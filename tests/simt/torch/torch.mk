# The tests marked `gpu`, with PyTorch and commlib's CUDA module on a simulated GPU: see ../README.md.
# Included by the Makefile, where `setup` makes the environment; works by itself in another one too:
# `make -f tests/simt/torch/torch.mk VENV=... test-gpu-simulated`.
VENV ?= .venv
BIN ?= $(abspath $(VENV))/bin
SEED ?=
SIMT_TORCH := build/simt/torch
include tests/simt/cuda.mk

# A library in place of libcudart, commlib's module on top of it, and PyTorch's device.
SIMT_TORCH_RUNTIME := $(filter-out tests/simt/test_%,$(wildcard tests/simt/*.cc)) \
  $(addprefix tests/simt/runtime/,cudart.cc driver.cc graphs.cc green_contexts.cc host_work.cc)
SIMT_TORCH_MODULE := $(wildcard csrc/backend/*.cc csrc/heap/*.cc csrc/cuda/*.cc) csrc/bindings/cuda.cc csrc/cuda/launch.cu \
  $(addprefix csrc/net/,inspection.cc network.cc topology.cc)
SIMT_TORCH_DEVICE := $(wildcard tests/simt/torch/*.cc)
SIMT_TORCH_BUILT := $(addprefix $(SIMT_TORCH)/,libcudart_simulated.so _cuda.so _simulated_cuda.so)

simt_torch_objects = $(addsuffix .o,$(addprefix $(SIMT_TORCH)/$(1)/,$(2)))
simt_torch_python = $(shell $(BIN)/python -c "import sysconfig, pybind11; \
  print('-I' + sysconfig.get_paths()['include'], '-isystem', pybind11.get_include())")
simt_torch_home = $(shell $(BIN)/python -c "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)")
SIMT_TORCH_FLAGS := -g1 -fPIC -ffp-contract=off -Wall -Wextra $(WERROR) -Wno-unknown-pragmas -pthread -DCOMMLIB_SIMT \
  -Icsrc -Itests -isystem $(SIMT_CUDA)/include

SIMT_TORCH_RUN = PYTHONPATH="$(abspath tests/simt/torch):$$PYTHONPATH" SIMULATED_GPU="$(abspath $(SIMT_TORCH))" \
  SIMT_SEED="$(SEED)" PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -p simulated_gpu -m gpu --deadline 60
# A simulated GPU fills one core.
TESTS ?= -n 2 --dist loadfile tests tests/simt/torch/checks.py

.PHONY: test-gpu-simulated simt-torch
test-gpu-simulated: simt-torch  ## the tests for a GPU on simulated ones, PyTorch included; TESTS=tests/gpu/test_cuda.py, SEED=n
	@$(SIMT_TORCH_RUN) -q $(TESTS)

simt-torch: $(if $(SIMT_CUDA),,no-cuda-headers) $(if $(filter Makefile,$(firstword $(MAKEFILE_LIST))),setup)
	@$(MAKE) --no-print-directory -j2 -f tests/simt/torch/torch.mk BIN=$(BIN) $(SIMT_TORCH_BUILT)

.PHONY: no-cuda-headers
no-cuda-headers:
	@echo "CUDA's headers are needed: CUDA_HOME, nvcc, or /usr/local/cuda"; exit 1

$(SIMT_TORCH)/libcudart_simulated.so: $(call simt_torch_objects,runtime,$(SIMT_TORCH_RUNTIME))
	@echo "simt $@"
	@$(CXX) -shared -pthread -Wl,-soname,$(@F) -Wl,--defsym=__executable_start=0 -o $@ $^
$(SIMT_TORCH)/_cuda.so: $(call simt_torch_objects,module,$(SIMT_TORCH_MODULE)) $(SIMT_TORCH)/libcudart_simulated.so
	@echo "simt $@"
	@$(CXX) -shared -pthread -o $@ $^ -Wl,-rpath,'$$ORIGIN'
$(SIMT_TORCH)/_simulated_cuda.so: $(call simt_torch_objects,device,$(SIMT_TORCH_DEVICE)) $(SIMT_TORCH)/libcudart_simulated.so
	@echo "simt $@"
	@$(CXX) -shared -pthread -o $@ $^ -L$(simt_torch_home)/lib -ltorch_cpu -lc10 \
	  -Wl,-rpath,'$$ORIGIN' -Wl,-rpath,$(simt_torch_home)/lib

define simt_torch_rules
$(SIMT_TORCH)/$(1)/%.o: % tests/simt/torch/torch.mk
	@mkdir -p $$(@D)
	@echo "simt $$(@:$(SIMT_TORCH)/%=%)"
	@$(CXX) $(SIMT_TORCH_FLAGS) $(2) -MMD -MP -c -o $$@ $(if $(filter module,$(1)),$$(if $$(filter %.cu,$$<),-include simt/runtime/cudart.h -x c++)) $$<
endef
$(eval $(call simt_torch_rules,runtime,-std=c++17 -O3))
$(eval $(call simt_torch_rules,module,-std=c++17 -O2 -fvisibility=hidden $$(simt_torch_python)))
$(eval $(call simt_torch_rules,device,-std=c++20 -O1 -isystem $$(simt_torch_home)/include $$(simt_torch_python)))

-include $(shell find $(SIMT_TORCH) -name '*.d' 2>/dev/null)
