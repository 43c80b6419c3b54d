# The core's C++ tests on AArch64, whose vector path is NEON: cross-compiled, and run by an emulator. Not part of
# `make test`: it needs Debian's g++-aarch64-linux-gnu and qemu-user-static.
AARCH64_CXX ?= aarch64-linux-gnu-g++
AARCH64_RUN ?= qemu-aarch64-static
AARCH64_SOURCES := $(wildcard csrc/backend/*.cc csrc/cpu/*.cc csrc/heap/*.cc tests/cpp/*.cc tests/cpp/cpu/*.cc)

.PHONY: test-aarch64
test-aarch64:  ## the C++ core with NEON, under an emulator (needs a cross compiler and QEMU)
	@mkdir -p build
	$(AARCH64_CXX) -std=c++17 -O2 -ffp-contract=off -Wall -Wextra $(WERROR) -Wno-unknown-pragmas -pthread -static \
	  -Icsrc -Itests -Itests/cpp -o build/tests-aarch64 $(AARCH64_SOURCES)
	$(AARCH64_RUN) build/tests-aarch64
