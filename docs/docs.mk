# The pages as HTML. Neither the build nor whoever reads them needs a network.
$(VENV)/docs: $(VENV)/requirements requirements-docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

.PHONY: docs
docs: setup $(VENV)/docs  ## the documentation, to build/docs/index.html; a reference that leads nowhere is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky -d build/doctrees docs build/docs
