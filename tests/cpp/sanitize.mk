# The core and its tests without Python, under AddressSanitizer with UBSan, and under ThreadSanitizer; and the
# module that Python loads, bindings and UCX included, under the first two.
# Included by the Makefile; works by itself too: `make -f tests/cpp/sanitize.mk test-sanitize`, with SANITIZE_PYTHON.
CXX ?= g++
SEED ?=
SANITIZE_PYTHON ?= $(if $(BIN),$(BIN)/python,python3)
SANITIZE := build/sanitize
SANITIZE_FLAGS := -std=c++17 -O1 -g1 -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra $(WERROR) -Wno-unknown-pragmas -fPIC -pthread -Icsrc
ASAN_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all
TSAN_FLAGS := -fsanitize=thread
SANITIZED := $(filter-out csrc/net/ucx_%,$(wildcard csrc/net/*.cc)) $(wildcard csrc/backend/*.cc csrc/cpu/*.cc csrc/heap/*.cc tests/cpp/*.cc tests/cpp/cpu/*.cc)
RUN_SANITIZED := sh tests/cpp/run_sanitized.sh

# A package of the sources in commlib/ with a module of its own.
SANITIZED_PACKAGE := $(SANITIZE)/python/commlib
BINDINGS := $(filter-out %/cuda.cc,$(wildcard csrc/bindings/*.cc)) $(wildcard csrc/net/ucx_*.cc)
BINDINGS_FLAGS = -fvisibility=hidden $(shell $(SANITIZE_PYTHON) tests/cpp/include_flags.py)
# Python itself is not instrumented: libasan must come first, and know libstdc++'s __cxa_throw. What it leaks is its own.
UNDER_ASAN = LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:suppressions=$(abspath tests/cpp/asan.supp) UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(abspath $(SANITIZE)/python) $(SANITIZE_PYTHON)
SANITIZED_RUNS ?= 40
SANITIZED_TESTS := tests/unit/test_arrays.py $(addprefix tests/protocol/,test_async.py test_bad_input.py test_waves.py)

.PHONY: test-sanitize test-sanitize-core test-sanitize-python
test-sanitize: test-sanitize-core test-sanitize-python  ## the C++ core and the bindings under sanitizers, SEED=n repeats a run

test-sanitize-core:
	@echo "== building the core with sanitizers: about a minute on two cores"
	@$(MAKE) --no-print-directory -j2 -f tests/cpp/sanitize.mk $(SANITIZE)/asan $(SANITIZE)/tsan
	ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 $(RUN_SANITIZED) $(SANITIZE)/asan $(SEED)
	TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1:suppressions=tests/cpp/tsan.supp $(RUN_SANITIZED) $(SANITIZE)/tsan $(SEED)

test-sanitize-python: $(if $(BIN),setup)
	@echo "== building the bindings with sanitizers: about a minute"
	@$(MAKE) --no-print-directory -j2 -f tests/cpp/sanitize.mk SANITIZE_PYTHON=$(SANITIZE_PYTHON) $(SANITIZED_PACKAGE)/_core.so
	@find $(abspath commlib) -mindepth 1 -maxdepth 1 ! -name '*.so' -exec ln -sfn -t $(SANITIZED_PACKAGE) {} +
	$(UNDER_ASAN) tests/soak --runs $(SANITIZED_RUNS) $(if $(SEED),--seed $(SEED))
	$(UNDER_ASAN) -m pytest -q $(SANITIZED_TESTS)

$(SANITIZED_PACKAGE)/_core.so: $(patsubst %.cc,$(SANITIZE)/asan-objects/%.o,$(filter csrc/%,$(SANITIZED)) $(BINDINGS))
	@mkdir -p $(@D)
	$(CXX) $(ASAN_FLAGS) -pthread -shared -o $@ $^

$(BINDINGS:%.cc=$(SANITIZE)/asan-objects/%.o): ASAN_FLAGS += $(BINDINGS_FLAGS)

$(SANITIZE)/asan: $(SANITIZED:%.cc=$(SANITIZE)/asan-objects/%.o)
	$(CXX) $(ASAN_FLAGS) -pthread -o $@ $^

$(SANITIZE)/tsan: $(SANITIZED:%.cc=$(SANITIZE)/tsan-objects/%.o)
	$(CXX) $(TSAN_FLAGS) -pthread -o $@ $^

$(SANITIZE)/asan-objects/%.o: %.cc tests/cpp/sanitize.mk
	@mkdir -p $(@D)
	@echo "asan $<"
	@$(CXX) $(SANITIZE_FLAGS) $(ASAN_FLAGS) -MMD -MP -c -o $@ $<

$(SANITIZE)/tsan-objects/%.o: %.cc tests/cpp/sanitize.mk
	@mkdir -p $(@D)
	@echo "tsan $<"
	@$(CXX) $(SANITIZE_FLAGS) $(TSAN_FLAGS) -MMD -MP -c -o $@ $<

-include $(patsubst %.cc,$(SANITIZE)/asan-objects/%.d,$(SANITIZED) $(BINDINGS)) $(SANITIZED:%.cc=$(SANITIZE)/tsan-objects/%.d)
