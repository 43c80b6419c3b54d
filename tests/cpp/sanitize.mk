# The core and its tests without Python, under AddressSanitizer with UBSan, and under ThreadSanitizer.
# Included by the Makefile; works by itself too: `make -f tests/cpp/sanitize.mk test-sanitize`.
CXX ?= g++
SEED ?=
SANITIZE := build/sanitize
SANITIZE_FLAGS := -std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas -pthread -Icsrc
ASAN_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all
TSAN_FLAGS := -fsanitize=thread
SANITIZED := $(filter-out csrc/net/ucx_%,$(wildcard csrc/net/*.cc)) $(wildcard csrc/backend/*.cc csrc/cpu/*.cc csrc/heap/*.cc tests/cpp/*.cc tests/cpp/cpu/*.cc)
RUN_SANITIZED := sh tests/cpp/run_sanitized.sh

.PHONY: test-sanitize
test-sanitize:  ## the C++ core under sanitizers, SEED=n repeats a run
	@echo "== building the core with sanitizers: about a minute on two cores"
	@$(MAKE) --no-print-directory -j2 -f tests/cpp/sanitize.mk $(SANITIZE)/asan $(SANITIZE)/tsan
	ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 $(RUN_SANITIZED) $(SANITIZE)/asan $(SEED)
	TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1:suppressions=tests/cpp/tsan.supp $(RUN_SANITIZED) $(SANITIZE)/tsan $(SEED)

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

-include $(SANITIZED:%.cc=$(SANITIZE)/asan-objects/%.d) $(SANITIZED:%.cc=$(SANITIZE)/tsan-objects/%.d)
