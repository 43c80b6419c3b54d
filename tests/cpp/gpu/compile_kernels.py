"""Compiles kernels as setup.py does, without the packages that setup.py itself needs.

python3 compile_kernels.py SOURCE TARGET     # an object, for COMMLIB_CUDA_ARCHS
python3 compile_kernels.py                   # prints the toolkit's folder, empty if there is none
"""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[3]


def stand_in(name: str, **attributes: Any) -> None:
    """A module that setup.py takes names from and, imported, calls nothing of that matters here."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


class Unused:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


stand_in("pybind11", get_include=str)
stand_in("pybind11.setup_helpers", ParallelCompile=Unused, Pybind11Extension=Unused, build_ext=Unused)
stand_in("setuptools", Distribution=Unused, setup=Unused)
sys.path.insert(0, str(ROOT))
import setup  # noqa: E402

if len(sys.argv) == 1:
    print(setup.CUDA_HOME or "")
else:
    if setup.CUDA_HOME is None:
        raise SystemExit("no nvcc found (PATH, CUDA_HOME)")
    source, target = sys.argv[1:]
    raise SystemExit(subprocess.run(setup.nvcc_command(source, Path(target)), cwd=ROOT).returncode)
