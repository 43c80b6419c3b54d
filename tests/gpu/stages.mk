# All there is to run on a GPU, step by step: docs/gpu.md. Included by the Makefile.
# GPU_PYTHON=python3 takes that interpreter with its packages, and installs nothing.
GPU_PYTHON ?=
GPU_RUN = $(or $(GPU_PYTHON),$(BIN)/python)
STAGE ?=
STEPS ?=
BUDGET ?=
RESULTS ?=
GPU_OPTIONS = $(if $(STAGE),--stage $(STAGE)) $(if $(STEPS),--steps $(STEPS)) $(if $(BUDGET),--budget $(BUDGET)) \
  $(if $(RESULTS),--results $(RESULTS))

.PHONY: gpu gpu-list gpu-sanitize
gpu: $(if $(GPU_PYTHON),,setup)  ## all there is for one GPU, step by step; STAGE=1, STEPS="module cpp", BUDGET=540
	$(GPU_RUN) tests/gpu/stages.py $(GPU_OPTIONS)

gpu-list:  ## the steps of `make gpu`
	@$(or $(GPU_PYTHON),$(PYTHON)) tests/gpu/stages.py --list $(GPU_OPTIONS)

gpu-sanitize:  ## compute-sanitizer's steps of `make gpu`
	$(MAKE) gpu STEPS="memcheck-cpp racecheck-cpp memcheck-small racecheck-small"
