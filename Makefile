# Two commands: `make bench` and `make test`. Both set everything up by themselves, in .venv.
PYTHON ?= python3
VENV ?= .venv
RANKS ?= 4
BIN := $(abspath $(VENV))/bin
# Open MPI from PyPI, in .venv; `make bench MPIRUN=mpirun` takes the system's.
MPIRUN ?= $(BIN)/mpirun
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-run-as-root)
LAUNCH = PATH="$(BIN):$$PATH" $(MPIRUN) $(AS_ROOT) --oversubscribe -n $(RANKS) $(BIN)/python
SOURCES := $(shell find csrc -name '*.cc' -o -name '*.h')
LINTED := commlib bench examples tests setup.py

.PHONY: help setup test bench bench-overlap train lint format clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^[^:]*\.mk://; s/^Makefile://; s/:[^#]*##/:/' | sort

$(VENV)/requirements: requirements-dev.txt
	@echo "== setting up $(VENV): about half a minute with a fast network"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/extension: $(VENV)/requirements setup.py pyproject.toml $(SOURCES)
	@echo "== building the extension: about half a minute"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

setup: $(VENV)/extension  ## virtual environment, dependencies, extension

test: setup  ## all tests
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest

bench: setup  ## dispatch and combine over commlib, gloo and MPI, RANKS=4
	$(LAUNCH) bench/dispatch_combine.py

bench-overlap: RANKS = 1
bench-overlap: setup  ## a communication thread beside a matmul, RANKS=1
	$(LAUNCH) bench/overlap.py

train: setup  ## a small MoE language model, experts over RANKS ranks, against the unsharded one
	$(LAUNCH) examples/train_moe_lm.py --check

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(wildcard tests/cpp/*.cc tests/cpp/*.h)

format: setup  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix --select I $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(SOURCES) $(wildcard tests/cpp/*.cc tests/cpp/*.h)

clean:  ## remove what was built
	rm -rf $(VENV) build *.egg-info commlib/*.so

-include tests/cpp/sanitize.mk
