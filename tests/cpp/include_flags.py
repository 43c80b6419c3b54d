"""Prints where the bindings' headers are: pybind11's, Python's, UCX's."""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from setup import core

print(*(f"-I{path}" for path in [*core.include_dirs, sysconfig.get_path("include")]))
