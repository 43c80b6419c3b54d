# What is made of the C++ sources besides the modules. Included by the Makefile.
.PHONY: stubs cuda-report wheel
stubs: setup  ## commlib/_core.pyi and _cuda.pyi, from the modules
	$(BIN)/python csrc/bindings/stubs.py

COMPILING := setup.py csrc/nvcc.py csrc/compile_commands.py $(wildcard tests/*/*.mk tests/*/*/*.mk) $(SOURCES) $(TEST_SOURCES)
compile_commands.json: $(VENV)/requirements $(COMPILING)  ## how C++ is compiled, for editors and clang-tidy
	$(BIN)/python csrc/compile_commands.py

cuda-report: setup  ## what nvcc made of the kernels: registers, stack, spills, instructions
	$(BIN)/python tests/cuda_report.py

# pip builds it in an environment of its own. Remains of an older build in build/lib.* would get in, too.
wheel:  ## for a GPU machine with another Python, or without nvcc: PYTHON=python3.12, to dist/
	rm -rf build/wheel build/lib.*
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PYTHON) tests/wheel_report.py build/wheel/*.whl
	@mkdir -p dist
	mv build/wheel/*.whl dist/
