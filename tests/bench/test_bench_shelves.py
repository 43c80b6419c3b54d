"""The package of the benchmarks: what each shelf may import, and that programs find it as they are run."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
BENCH = ROOT / "bench"
SOURCES = sorted(path for path in BENCH.rglob("*.py") if path.name != "bench.py")
PROGRAMS = [path.stem for path in sorted(BENCH.glob("*.py")) if "__main__" in path.read_text()]
ORDER = ["harness", "rig", "systems", "programs"]  # each may import those before it


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in SOURCES}


def imported(path):
    """Modules of the benchmarks that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found & MODULES - {"bench"}


def shelf(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or parts[1] in ORDER else "programs"


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_a_shelf_imports_nothing_of_those_above_it(path):
    if path.parent == BENCH:
        return
    may = ORDER[: ORDER.index(path.parent.name) + 1]
    assert {name for name in imported(path) if shelf(name) not in may} == set()


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({module(path): imported(path) - {module(path)} for path in SOURCES}).prepare()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_run_by_its_path_finds_the_package(tmp_path, program):
    """Also where not the checkout is on Python's path, but commlib alone."""
    (tmp_path / "commlib").symlink_to(ROOT / "commlib")
    starts([str(BENCH / f"{program}.py")], cwd=tmp_path, path=tmp_path)


def test_a_program_that_is_run_as_a_module_finds_the_package():
    starts(["-m", "bench.dispatch_combine"], cwd=ROOT, path=ROOT)


def starts(command, cwd, path):
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
