# The CUDA backend on the CPU, under AddressSanitizer and UBSan, with the bulk copy engine and without it; and
# once more to look for races.
# Included by the Makefile; works by itself too: `make -f tests/simt/simt.mk test-simt`.
CXX ?= g++
SEED ?=
SIMT := build/simt
SIMT_FLAGS := -std=c++17 -O1 -g1 -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra $(WERROR) -Wno-unknown-pragmas \
  -fsanitize=address,undefined -fno-sanitize-recover=all -pthread -DCOMMLIB_SIMT -Icsrc -Itests
SIMT_RUN = $(if $(SEED),--seed $(SEED))

# The shim and kernels by themselves.
SIMT_SHIM := $(filter-out tests/simt/test_%,$(wildcard tests/simt/*.cc)) tests/cpp/main.cc
SIMT_TESTS := $(wildcard tests/simt/test_*.cc)

# The whole backend, by the tests of tests/cpp/. It takes CUDA's headers, and no library.
include tests/simt/cuda.mk
SIMT_BACKEND := $(wildcard csrc/backend/*.cc csrc/heap/*.cc) $(filter-out csrc/net/ucx_%,$(wildcard csrc/net/*.cc)) \
  $(filter-out %/partition.cc,$(wildcard csrc/cuda/*.cc)) $(filter-out %/main.cc,$(wildcard tests/cpp/*.cc)) \
  $(filter-out %/cudart.cc,$(wildcard tests/simt/runtime/*.cc))
SIMT_KERNELS := csrc/cuda/launch.cu tests/simt/runtime/cudart.cc

# What does not depend on the engine is compiled once for each pair.
objects = $(addsuffix .o,$(addprefix $(SIMT)/$(1)/,$(2)))
# The longest run first, so that it runs beside all the others.
SIMT_PROGRAMS := $(if $(SIMT_CUDA),$(SIMT)/backend-races $(SIMT)/backend-bulk $(SIMT)/backend-plain) \
  $(SIMT)/kernels-bulk $(SIMT)/kernels-plain

SIMT_RUNS := $(addsuffix .run,$(SIMT_PROGRAMS))

.PHONY: test-simt $(SIMT_RUNS)
test-simt:  ## the CUDA backend on simulated GPUs, SEED=n repeats a run
	sh tests/simt/same_functions.sh csrc/cuda/ptx.cuh tests/simt/ptx.h
	@echo "== building simulated GPUs: about two minutes on two cores"
	@$(MAKE) --no-print-directory -j2 -f tests/simt/simt.mk $(SIMT_PROGRAMS)
	@$(MAKE) --no-print-directory -j2 -Otarget -f tests/simt/simt.mk $(SIMT_RUNS)
	@$(if $(SIMT_CUDA),,echo "== NOT RUN: the backend as a whole, for want of CUDA's headers (CUDA_HOME, nvcc, /usr/local/cuda)")

$(SIMT_RUNS): %.run: %
	@echo "== $*"
	@$* $(SIMT_RUN)

$(SIMT)/kernels-bulk: $(call objects,with-bulk,$(SIMT_TESTS)) $(call objects,any,$(SIMT_SHIM))
$(SIMT)/kernels-plain: $(call objects,no-bulk,$(SIMT_TESTS)) $(call objects,any,$(SIMT_SHIM))
$(SIMT)/backend-bulk: $(call objects,with-bulk,$(SIMT_KERNELS)) $(call objects,any,$(SIMT_BACKEND) $(SIMT_SHIM))
$(SIMT)/backend-plain: $(call objects,no-bulk,$(SIMT_KERNELS)) $(call objects,any,$(SIMT_BACKEND) $(SIMT_SHIM))
$(SIMT)/backend-races: $(call objects,races,csrc/cuda/launch.cu) $(call objects,with-bulk,tests/simt/runtime/cudart.cc) \
  $(call objects,any,$(SIMT_BACKEND) $(SIMT_SHIM))
$(SIMT)/kernels-bulk $(SIMT)/kernels-plain $(SIMT)/backend-bulk $(SIMT)/backend-plain $(SIMT)/backend-races:
	@echo "simt $@"
	@$(CXX) -fsanitize=address,undefined -pthread -o $@ $^

$(SIMT)/no-bulk/%.o: SIMT_FLAGS += -DCOMMLIB_SIMT_NO_BULK
define simt_rules
$(SIMT)/$(1)/%.cc.o: %.cc tests/simt/simt.mk
	$$(call simt_compile)
$(SIMT)/$(1)/%.cu.o: %.cu tests/simt/simt.mk
	$$(call simt_compile,-include simt/runtime/cudart.h -x c++)
endef
define simt_compile
	@mkdir -p $(@D)
	@echo "simt $(@:$(SIMT)/%=%)"
	@$(CXX) $(SIMT_FLAGS) $(if $(SIMT_CUDA),-isystem $(SIMT_CUDA)/include) $(1) -MMD -MP -c -o $@ $<
endef
# The machine itself, at every step of every thread.
$(foreach file,machine barriers races,$(SIMT)/any/tests/simt/$(file).cc.o): SIMT_FLAGS := \
  $(filter-out -O1 -fsanitize=address%,$(SIMT_FLAGS)) -O3
# g++ runs one sanitizer at a time; accesses.cc is the other's library.
$(SIMT)/races/%.o: SIMT_FLAGS := $(filter-out -fsanitize=address%,$(SIMT_FLAGS)) -fsanitize=thread
$(foreach kind,any with-bulk no-bulk races,$(eval $(call simt_rules,$(kind))))

-include $(shell find $(SIMT) -name '*.d' 2>/dev/null)
