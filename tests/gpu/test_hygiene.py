"""What tests/conftest.py does for tests that need a GPU, with a made-up one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MADE_UP = """
import threading, time
import torch
from commlib import cuda

cuda.is_available = lambda: True
torch.cuda.is_initialized = lambda: True
states = {"idle": lambda: None, "busy": lambda: time.sleep(60)}

def synchronize():
    states[state]()

def broken():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

states["broken"] = broken
torch.cuda.synchronize = synchronize
state = "idle"
"""
TWO_TESTS = """
import made_up
import pytest
from commlib import ExpertParallel

def deadline():
    with ExpertParallel(num_experts=2, hidden=8, topk=1, max_tokens=4, device="cpu") as ep:
        return ep.timeout

@pytest.mark.gpu
def test_first():
    made_up.state = {state!r}
    assert deadline() == {deadline}

def test_second():
    assert deadline() == 600.0
"""


@pytest.fixture
def run(tmp_path):
    def run(state, *options, deadline=600.0):
        (tmp_path / "made_up.py").write_text(MADE_UP)
        (tmp_path / "test_two.py").write_text(TWO_TESTS.format(state=state, deadline=deadline))
        path = os.pathsep.join([str(tmp_path), str(TESTS), str(TESTS / "support"), str(TESTS.parent)])
        plugins = ("-p", "conftest", "-p", "made_up", "-p", "no:cacheprovider", "--noconftest")
        where = ("--rootdir", str(tmp_path), str(tmp_path / "test_two.py"))
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-v", *plugins, *options, *where],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_an_idle_gpu_lets_the_tests_go_on(run):
    done = run("idle")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_a_cuda_error_ends_the_run_with_the_test_that_left_it(run):
    done = run("broken")
    assert done.returncode == 1
    assert "test_second" not in done.stdout
    assert "after test_two.py::test_first the GPU is of no more use: CUDA error: an illegal" in done.stdout


def test_a_gpu_that_does_not_become_idle_ends_the_run(run):
    done = run("busy", "--rest", "0.2")
    assert done.returncode == 1
    assert "test_second" not in done.stdout
    assert "test_first the GPU is of no more use: it is not idle after 0.2 s" in done.stdout


def test_a_deadline_is_for_the_tests_of_the_gpu(run):
    done = run("idle", "--deadline", "4.5", deadline=4.5)
    assert done.returncode == 0, done.stdout + done.stderr
