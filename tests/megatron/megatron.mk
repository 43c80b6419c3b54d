# Megatron-Core's token dispatcher over commlib.compat.deep_ep, in an environment of its own: versions after 0.16
# need Python 3.12. `make test` runs the same tests with 0.16.
# Included by the Makefile.
MEGATRON_VENV ?= .venv-megatron
MEGATRON_BIN := $(abspath $(MEGATRON_VENV))/bin
# pyenv's python3.12 may be a shim that only says where to find one.
PYTHON312 ?= $(shell for p in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do \
  "$$p" -c pass 2>/dev/null && echo "$$p" && break; done)

.PHONY: test-megatron run-megatron
test-megatron:  ## Megatron-Core's token dispatcher over commlib, where there is a Python 3.12
	@python="$(PYTHON312)"; if [ -z "$$python" ]; then echo "test-megatron skipped: no Python 3.12"; \
	else $(MAKE) --no-print-directory run-megatron PYTHON312="$$python"; fi

run-megatron: $(MEGATRON_VENV)/extension
	$(MEGATRON_BIN)/python -m pytest tests/megatron

$(MEGATRON_VENV)/requirements: requirements-megatron.txt
	@echo "== setting up $(MEGATRON_VENV): minutes, and gigabytes where torch for Python 3.12 is CUDA's"
	$(PYTHON312) -m venv $(MEGATRON_VENV)
	$(MEGATRON_BIN)/pip install --quiet --disable-pip-version-check -r requirements-megatron.txt
	@touch $@

$(MEGATRON_VENV)/extension: $(MEGATRON_VENV)/requirements setup.py csrc/nvcc.py pyproject.toml $(SOURCES)
	@echo "== building the extension for Python 3.12, without CUDA"
	COMMLIB_CUDA_ARCHS=none $(MEGATRON_BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation \
	  --no-deps -e .
	@touch $@
