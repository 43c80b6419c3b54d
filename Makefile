# Two commands: `make bench` and `make test`. Both set everything up by themselves, in .venv.
PYTHON ?= python3
VENV ?= .venv
RANKS ?= 4
BIN := $(abspath $(VENV))/bin
# Open MPI from PyPI, in .venv; `make bench MPIRUN=mpirun` takes the system's.
MPIRUN ?= $(BIN)/mpirun
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-run-as-root)
launch = PATH="$(BIN):$$PATH" $(MPIRUN) $(AS_ROOT) --oversubscribe -n $(1) $(BIN)/python
LAUNCH = $(call launch,$(RANKS))
SOURCES := $(shell find csrc -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_SOURCES := $(shell find tests/cpp tests/simt -name '*.cc' -o -name '*.h')
LINTED := commlib bench examples tests setup.py

.PHONY: help setup test bench bench-overlap bench-link bench-nodes train lint format cuda-report clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^[^:]*\.mk://; s/^Makefile://; s/:[^#]*##/:/' | sort

$(VENV)/requirements: requirements-dev.txt
	@echo "== setting up $(VENV): about half a minute with a fast network"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/extension: $(VENV)/requirements setup.py pyproject.toml $(SOURCES)
	@echo "== building the extension: about half a minute, two with nvcc"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c "from commlib import cuda; print('== CUDA backend:', cuda.why_not() or 'ready')"
	@touch $@

setup: $(VENV)/extension  ## virtual environment, dependencies, extension

test: setup  ## all tests
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest

bench: setup  ## dispatch and combine over commlib, gloo and MPI, RANKS=4
	$(LAUNCH) bench/dispatch_combine.py

bench-overlap: setup  ## communication beside compute: on cores of their own; on slow links, with a whole MoE layer
	$(call launch,1) bench/overlap.py --tokens 4096 --hidden 7168 --experts 64 --topk 8
	$(call launch,2) bench/overlap.py

bench-link: RANKS = 8
bench-link: setup  ## what an H800's link leaves, slowed down; how few threads fill it; RANKS=8
	$(LAUNCH) bench/dispatch_combine.py --preset h800

bench-nodes: setup  ## as root: across nodes whose links are limited for real; NODES_BENCH=--small
	PATH="$(BIN):$$PATH" $(BIN)/python bench/nodes.py $(NODES_BENCH)

train: setup  ## a small MoE language model, experts over RANKS ranks, against the unsharded one
	$(LAUNCH) examples/train_moe_lm.py --check

# On a GPU. GPU_PYTHON=python3 takes that interpreter with what it has, builds in place and installs nothing.
GPU_PYTHON ?=
GPU_RUN = $(or $(GPU_PYTHON),$(BIN)/python)
GPU_TESTS ?= -m gpu --maxfail=10 --durations=10
GPU_RANKS ?= 4
SANITIZER ?= compute-sanitizer
IN_PLACE := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
# Ranks that share a GPU wait for each other on it: load no kernel meanwhile, and give each stream a queue.
GPU_ENV := $(IN_PLACE) CUDA_MODULE_LOADING=EAGER CUDA_DEVICE_MAX_CONNECTIONS=32

.PHONY: gpu gpu-build gpu-test gpu-bench gpu-sanitize
gpu: gpu-test gpu-bench  ## all there is for one GPU, under 9 minutes; GPU_PYTHON=python3 installs nothing

gpu-build: $(if $(GPU_PYTHON),,setup)
	$(if $(GPU_PYTHON),$(GPU_PYTHON) setup.py --quiet build_ext --inplace)
	@$(GPU_ENV) $(GPU_RUN) -c 'import sys; from commlib import cuda; sys.exit(cuda.why_not() or 0)'

gpu-test: gpu-build  ## tests that need a GPU
	$(GPU_ENV) $(GPU_RUN) -m pytest $(GPU_TESTS)

gpu-bench: gpu-build  ## dispatch and combine on one GPU, its ranks threads; overlap; a limited link: bench/results/
	$(GPU_ENV) $(GPU_RUN) bench/gpu.py $(GPU_BENCH)
	$(GPU_ENV) $(GPU_RUN) bench/overlap.py --device cuda --ranks $(GPU_RANKS) $(GPU_OVERLAP)
	$(GPU_ENV) $(GPU_RUN) bench/dispatch_combine.py --preset h800 --device cuda --ranks $(GPU_RANKS) $(GPU_LINK)

# Kernels are loaded as they are first used here: to watch all of PyTorch's being loaded takes the sanitizer
# long. The program's first run has one rank, which waits for nobody, and loads all that the next one needs.
gpu-sanitize: gpu-build  ## compute-sanitizer's memcheck and racecheck on a small program
	for tool in memcheck racecheck; do \
	  $(IN_PLACE) CUDA_MODULE_LOADING=LAZY CUDA_DEVICE_MAX_CONNECTIONS=32 \
	    $(SANITIZER) --tool $$tool --error-exitcode 1 $(GPU_RUN) tests/programs/gpu_small.py || exit 1; \
	done

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(TEST_SOURCES)

format: setup  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix --select I $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(SOURCES) $(TEST_SOURCES)

cuda-report: setup  ## what nvcc made of the kernels: registers, stack, spills, instructions
	$(BIN)/python tests/cuda_report.py

clean:  ## remove what was built
	rm -rf $(VENV) build *.egg-info commlib/*.so

-include tests/cpp/sanitize.mk tests/cpp/aarch64.mk tests/cpp/gpu/gpu.mk tests/simt/simt.mk
