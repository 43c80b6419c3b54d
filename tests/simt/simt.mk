# The CUDA kernels on the CPU, under AddressSanitizer and UBSan: with the bulk copy engine and without it.
# Included by the Makefile; works by itself too: `make -f tests/simt/simt.mk test-simt`.
CXX ?= g++
SEED ?=
SIMT := build/simt
SIMT_FLAGS := -std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas \
  -fsanitize=address,undefined -fno-sanitize-recover=all -DCOMMLIB_SIMT -Icsrc -Itests
SIMT_TESTS := $(wildcard tests/simt/test_*.cc)
SIMT_CSRC :=  # sources of csrc/ that the tests link
SIMT_SHIM := $(filter-out $(SIMT_TESTS),$(wildcard tests/simt/*.cc)) $(SIMT_CSRC)
SIMT_SHIM_OBJECTS := $(SIMT_SHIM:%.cc=$(SIMT)/shim/%.o)
SIMT_BULK_OBJECTS := $(SIMT_TESTS:%.cc=$(SIMT)/bulk-objects/%.o)
SIMT_PLAIN_OBJECTS := $(SIMT_TESTS:%.cc=$(SIMT)/plain-objects/%.o)
SIMT_RUN = $(if $(SEED),--seed $(SEED))

.PHONY: test-simt
test-simt: $(SIMT)/bulk $(SIMT)/plain  ## the CUDA kernels on simulated GPUs, SEED=n repeats a run
	sh tests/simt/same_functions.sh csrc/cuda/ptx.cuh tests/simt/ptx.h
	@echo "== with bulk copies"
	$(SIMT)/bulk $(SIMT_RUN)
	@echo "== without bulk copies"
	$(SIMT)/plain $(SIMT_RUN)

$(SIMT)/bulk: $(SIMT_BULK_OBJECTS) $(SIMT_SHIM_OBJECTS)
	$(CXX) -fsanitize=address,undefined -o $@ $^

$(SIMT)/plain: $(SIMT_PLAIN_OBJECTS) $(SIMT_SHIM_OBJECTS)
	$(CXX) -fsanitize=address,undefined -o $@ $^

$(SIMT)/shim/%.o: %.cc tests/simt/simt.mk
	@mkdir -p $(@D)
	@echo "simt $<"
	@$(CXX) $(SIMT_FLAGS) -MMD -c -o $@ $<

$(SIMT)/bulk-objects/%.o: %.cc tests/simt/simt.mk
	@mkdir -p $(@D)
	@echo "simt, bulk copies, $<"
	@$(CXX) $(SIMT_FLAGS) -MMD -c -o $@ $<

$(SIMT)/plain-objects/%.o: %.cc tests/simt/simt.mk
	@mkdir -p $(@D)
	@echo "simt, no bulk copies, $<"
	@$(CXX) $(SIMT_FLAGS) -DCOMMLIB_SIMT_NO_BULK -MMD -c -o $@ $<

-include $(SIMT_SHIM_OBJECTS:.o=.d) $(SIMT_BULK_OBJECTS:.o=.d) $(SIMT_PLAIN_OBJECTS:.o=.d)
