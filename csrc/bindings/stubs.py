"""Writes the stubs of the modules, commlib/_core.pyi and commlib/_cuda.pyi, from the modules themselves.

    python csrc/bindings/stubs.py    # of the modules that are built

Signatures come from the bindings: an argument named by ``""_a`` has its own type in a stub, and one named by
``py::arg`` whatever converts to it.
"""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "commlib"
MODULES = ("_core", "_cuda")
RUFF = [sys.executable, "-m", "ruff", "--quiet", "--config", str(PACKAGE.parent / "pyproject.toml")]


def is_built(module: str) -> bool:
    try:
        importlib.import_module(f"commlib.{module}")
    except ImportError:
        return False
    return True


def stub_of(module: str) -> str:
    """The stub of a module that is built, in the form that `make lint` wants."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pybind11_stubgen", "--exit-code", "-o", place, f"commlib.{module}"]
        subprocess.run(command, check=True)
        stub = Path(place) / "commlib" / f"{module}.pyi"
        for step in (["format"], ["check", "--fix"], ["format"]):
            subprocess.run([*RUFF, *step, str(stub)], check=True)
        return stub.read_text()


def main() -> None:
    for module in MODULES:
        if is_built(module):
            (PACKAGE / f"{module}.pyi").write_text(stub_of(module))
        else:
            print(f"{module}.pyi: left as it is, for {module} is not built here")


if __name__ == "__main__":
    main()
