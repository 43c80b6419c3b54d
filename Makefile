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
# For the tests in C++, as csrc/nvcc.py does for the modules: warnings are errors only in CI.
export WERROR ?= $(if $(filter-out 0,$(COMMLIB_WERROR)),-Werror)
TEST_SOURCES := $(shell find tests/cpp tests/simt -name '*.cc' -o -name '*.h')
LINTED := commlib bench csrc examples tests setup.py

.PHONY: help setup test soak bench bench-overlap bench-link bench-layer bench-nodes train lint format cuda-report clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^[^:]*\.mk://; s/^Makefile://; s/:[^#]*##/:/' | sort

$(VENV)/requirements: requirements-dev.txt requirements-integrations.txt
	@echo "== setting up $(VENV): about half a minute with a fast network"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-integrations.txt
	@touch $@

$(VENV)/extension: $(VENV)/requirements setup.py csrc/nvcc.py pyproject.toml $(SOURCES)
	@echo "== building the extension: about half a minute, two with nvcc"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c "from commlib import cuda; print('== CUDA backend:', cuda.why_not() or 'ready')"
	@touch $@

setup: $(VENV)/extension  ## virtual environment, dependencies, extension

test: setup  ## all tests
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest

.PHONY: test-hf-all
test-hf-all: setup  ## every transformers model with experts, tiny, spread over two ranks; about a minute
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/hf_all.py

RUNS ?= 200
soak: setup  ## random faults in random runs, RUNS=200; SEED=n JOBS=n repeat and speed it up
	$(BIN)/python tests/soak --runs $(RUNS) $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS))

# Samples go to bench/results/local/, which git ignores; README and docs/ cite those in bench/results/.
bench: setup  ## dispatch and combine over commlib, gloo and MPI, RANKS=4
	$(LAUNCH) bench/dispatch_combine.py

bench-overlap: setup  ## communication beside compute: on cores of their own; on slow links, with a whole MoE layer
	$(call launch,1) bench/overlap.py --tokens 4096 --hidden 7168 --experts 64 --topk 8
	$(call launch,2) bench/overlap.py

bench-link: RANKS = 8
bench-link: setup  ## what an H800's link leaves, slowed down; how few threads fill it; RANKS=8
	$(LAUNCH) bench/dispatch_combine.py --preset h800

bench-layer: setup  ## a whole MoE layer over commlib and over all-to-alls; RANKS=4; LAYER_BENCH="--tokens 1024"
	$(LAUNCH) bench/moe_layer.py $(LAYER_BENCH)

bench-nodes: setup  ## as root: across nodes whose links are limited for real; NODES_BENCH=--small
	PATH="$(BIN):$$PATH" $(BIN)/python bench/nodes.py $(NODES_BENCH)

train: setup  ## a small MoE language model, experts over RANKS ranks, against the unsharded one
	$(LAUNCH) examples/train_moe_lm.py --check

# On a GPU. GPU_PYTHON=python3 takes that interpreter with its packages, and installs nothing. docs/gpu.md
GPU_PYTHON ?=
GPU_RUN = $(or $(GPU_PYTHON),$(BIN)/python)
STAGE ?=
STEPS ?=
BUDGET ?=
RESULTS ?=
GPU_OPTIONS = $(if $(STAGE),--stage $(STAGE)) $(if $(STEPS),--steps $(STEPS)) $(if $(BUDGET),--budget $(BUDGET)) \
  $(if $(RESULTS),--results $(RESULTS))

.PHONY: gpu gpu-list gpu-sanitize wheel
gpu: $(if $(GPU_PYTHON),,setup)  ## all there is for one GPU, step by step; STAGE=1, STEPS="module cpp", BUDGET=540
	+$(GPU_RUN) tests/gpu/stages.py $(GPU_OPTIONS)

gpu-list:  ## the steps of `make gpu`
	@$(or $(GPU_PYTHON),$(PYTHON)) tests/gpu/stages.py --list $(GPU_OPTIONS)

gpu-sanitize:  ## compute-sanitizer's steps of `make gpu`
	$(MAKE) gpu STEPS="memcheck-cpp racecheck-cpp memcheck-small racecheck-small"

# pip builds it in an environment of its own. Remains of an older build in build/lib.* would get in, too.
wheel:  ## for a GPU machine with another Python, or without nvcc: PYTHON=python3.12, to dist/
	rm -rf build/wheel build/lib.*
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PYTHON) tests/wheel_report.py build/wheel/*.whl
	@mkdir -p dist
	mv build/wheel/*.whl dist/

lint: export COMMLIB_WERROR = 1
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
	rm -rf $(VENV) $(MEGATRON_VENV) build *.egg-info commlib/*.so commlib/*.sources

-include tests/cpp/sanitize.mk tests/cpp/aarch64.mk tests/cpp/gpu/gpu.mk tests/simt/simt.mk tests/megatron/megatron.mk tests/simt/torch/torch.mk
