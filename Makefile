# Two commands: `make bench` and `make test`. Both set everything up by themselves, in .venv.
PYTHON ?= python3
VENV ?= .venv
RANKS ?= 4
BIN := $(abspath $(VENV))/bin
PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check
# Open MPI from PyPI, in .venv; `make bench MPIRUN=mpirun` takes the system's.
MPIRUN ?= $(BIN)/mpirun
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-run-as-root)
launch = PATH="$(BIN):$$PATH" $(MPIRUN) $(AS_ROOT) --oversubscribe -n $(1) $(BIN)/python
LAUNCH = $(call launch,$(RANKS))
SOURCES := $(shell find csrc -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_SOURCES := $(shell find tests/cpp tests/simt -name '*.cc' -o -name '*.h')
LINTED := commlib bench csrc docs examples tests setup.py
# For the tests in C++, as csrc/nvcc.py does for the modules: warnings are errors only in CI.
export WERROR ?= $(if $(filter-out 0,$(COMMLIB_WERROR)),-Werror)

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z0-9_.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | sort

# -- setting up -----------------------------------------------------------------------------------------------
.PHONY: setup clean
$(VENV)/requirements: requirements-dev.txt requirements-integrations.txt
	@echo "== setting up $(VENV): about half a minute with a fast network"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r requirements-dev.txt
	$(PIP_INSTALL) --no-deps -r requirements-integrations.txt
	@touch $@

$(VENV)/extension: $(VENV)/requirements setup.py csrc/nvcc.py pyproject.toml $(SOURCES)
	@echo "== building the extension: about half a minute, two with nvcc"
	$(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@$(BIN)/python -c "from commlib import cuda; print('== CUDA backend:', cuda.why_not() or 'ready')"
	@touch $@

setup: $(VENV)/extension  ## virtual environment, dependencies, extension

clean:  ## remove what was built
	rm -rf $(VENV) $(MEGATRON_VENV) build *.egg-info commlib/*.so commlib/*.sources compile_commands.json

# -- tests ----------------------------------------------------------------------------------------------------
.PHONY: test test-hf-all soak train
test: setup  ## all tests, two files at a time; those of faults have deadlines, and the cores to themselves
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/faults
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest tests/faults

test-hf-all: setup  ## every transformers model with experts, tiny, spread over two ranks; about a minute
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/hf_all.py

RUNS ?= 200
soak: setup  ## random faults in random runs, RUNS=200; SEED=n JOBS=n repeat and speed it up
	$(BIN)/python tests/soak --runs $(RUNS) $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS))

train: setup  ## a small MoE language model, experts over RANKS ranks, against the unsharded one
	$(LAUNCH) examples/train_moe_lm.py --check

# -- what sources must be: .pre-commit-config.yaml runs the same before a commit ------------------------------
.PHONY: lint lint-ruff lint-mypy lint-clang-format lint-clang-tidy format hooks
lint: lint-ruff lint-mypy lint-clang-format lint-clang-tidy  ## ruff, mypy, clang-format, clang-tidy

lint-ruff: $(VENV)/requirements
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)

lint-mypy: $(VENV)/requirements
	$(BIN)/mypy

lint-clang-format: $(VENV)/requirements
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(TEST_SOURCES)

lint-clang-tidy: compile_commands.json
	$(BIN)/python $(BIN)/run-clang-tidy.py -clang-tidy-binary $(BIN)/clang-tidy -p . -quiet '/csrc/.*\.cc$$'

format: $(VENV)/requirements  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix --select I $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(SOURCES) $(TEST_SOURCES)

hooks: $(VENV)/requirements  ## let git run lint's checks of what has changed before each commit
	$(BIN)/pre-commit install

-include bench/bench.mk csrc/csrc.mk docs/docs.mk tests/gpu/stages.mk
-include tests/cpp/sanitize.mk tests/cpp/aarch64.mk tests/cpp/gpu/gpu.mk tests/simt/simt.mk tests/simt/torch/torch.mk tests/megatron/megatron.mk
