# The pages as HTML. Neither the build nor whoever reads them needs a network.
$(VENV)/docs: $(VENV)/requirements docs/requirements.txt
	$(PIP_INSTALL) -r docs/requirements.txt
	@touch $@

.PHONY: docs
docs: setup $(VENV)/docs  ## the documentation, to build/docs/index.html; a reference that leads nowhere is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky -d build/doctrees docs build/docs
