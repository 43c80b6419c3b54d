"""What `make test-gpu-simulated` leaves out exists, has a reason, and is not counted as passed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
HERE = TESTS / "simt/torch"
ONE_OF_EACH = """
import pytest

def test_passes(): pass
def test_skips_itself(): pytest.skip("no reason")
def test_is_left_out(): pytest.fail("it was run")
"""


@pytest.fixture
def not_run(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    import not_run

    return not_run


def test_what_is_left_out_exists_and_has_a_reason(not_run):
    for file, function in not_run.functions():
        (path,) = TESTS.rglob(file)
        known = {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}
        assert function in known, f"{file} has no {function}"
    assert all(len(reason) > 10 for reason in not_run.NOT_RUN.values())


def test_a_case_that_is_left_out_or_skips_itself_has_not_passed(tmp_path):
    (tmp_path / "test_each.py").write_text(ONE_OF_EACH)
    (tmp_path / "list.py").write_text(
        "import not_run\nnot_run.NOT_RUN['test_each.py::test_is_left_out'] = 'for a test'"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "list", "-p", "simulated_gpu", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{tmp_path}", "SIMULATED_GPU": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 deselected" in done.stdout
    assert "test_skips_itself skips itself: name it in not_run.py" in done.stdout
    assert "not run on the simulated GPU: 1 cases" in done.stdout
    assert "test_each.py::test_is_left_out: for a test" in done.stdout
