"""Writes the stubs of the modules, commlib/_core.pyi and commlib/_cuda.pyi, from the modules themselves.

    python csrc/bindings/stubs.py            # of the modules that are built
    python csrc/bindings/stubs.py --check    # only says which stubs are not what their modules give

Signatures come from the bindings: an argument named by ``""_a`` has its own type in a stub, and one named by
``py::arg`` whatever converts to it.
"""

import argparse
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a stub is out of date")
    check = parser.parse_args().check
    stale = 0
    for module in MODULES:
        path = PACKAGE / f"{module}.pyi"
        if not is_built(module):
            print(f"{path.name}: left as it is, for {module} is not built here")
        elif (stub := stub_of(module)) != path.read_text():
            stale += 1
            print(f"{path.name}: " + ("not what the module gives: `make stubs`" if check else "written"))
            if not check:
                path.write_text(stub)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
