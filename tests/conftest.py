"""Shared by all tests."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

# Ranks that share a GPU wait for each other on it. CUDA must then neither load a kernel while one runs,
# which can wait for the device to be idle, nor put the streams of two ranks into one hardware queue. It
# reads both settings when it starts.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import hypothesis
import torch
from processes import run_processes, with_torch

from commlib import ExpertParallel, cuda

# What an example takes says more of the machine's other work than of commlib.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# Ranks are threads and processes here, many more than cores.
torch.set_num_threads(1)

# A shell ignores SIGINT for what it starts in the background, and nohup SIGHUP, and executed programs inherit
# that. They do not inherit handlers: with one here, tests may send their programs both.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)  # the tests go on

_deselected = pytest.StashKey[str]()


def pytest_addoption(parser):
    seconds = {
        "--deadline": (None, "that a rank of a GPU test waits for another one, where the test does not say"),
        "--rest": (20.0, "that a GPU has after a test to become idle; its kernels end at their deadline"),
    }
    for name, (default, what) in seconds.items():
        parser.addoption(name, type=float, default=default, help=f"seconds {what}")


@pytest.fixture(autouse=True)
def gpu_at_rest(request, monkeypatch):
    """A test leaves the GPU idle and in order, or is the last one: a process keeps a CUDA error."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    deadline = request.config.getoption("--deadline")
    if deadline is not None:
        monkeypatch.setitem(ExpertParallel.__init__.__kwdefaults__, "timeout", deadline)
    yield
    if trouble := trouble_with_gpu(request.config.getoption("--rest")):
        pytest.exit(f"after {request.node.nodeid} the GPU is of no more use: {trouble}", returncode=1)


def trouble_with_gpu(seconds):
    """What keeps the GPU from becoming idle in ``seconds``; nothing if it becomes idle."""
    found = [f"it is not idle after {seconds:g} s"]

    def wait():
        try:
            torch.cuda.synchronize()
            found.clear()
        except RuntimeError as error:
            found[:] = [str(error)]

    if not torch.cuda.is_initialized():
        return ""
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(seconds)
    return "".join(found)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """What a test's tensors and ranks are on. One for the session, so that hypothesis may share it."""
    return request.param


def pytest_collection_modifyitems(config, items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not cuda.is_available():
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        config.stash[_deselected] = f"gpu: {len(gpu)} tests deselected, no GPU can be used: {cuda.why_not()}"


def pytest_report_collectionfinish(config):
    return config.stash.get(_deselected, [])


class HostEvent:
    """A CUDA event where everything happens at once, on the host."""

    def __init__(self, enable_timing=False):
        pass

    def record(self, stream=None):
        self.moment = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return (later.moment - self.moment) * 1e3


class HostStream:
    def synchronize(self):
        pass

    def wait_event(self, event):
        pass


@pytest.fixture
def host_clock(monkeypatch):
    """Code for a GPU that times with CUDA's events, on the CPU."""
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "Stream", HostStream)
    monkeypatch.setattr(torch.cuda, "current_stream", HostStream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: time.sleep(1e-3))


@pytest.fixture
def in_processes(tmp_path):
    """``run(main, size)``: see processes.run_processes."""
    return lambda main, size: run_processes(main, size, tmp_path)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Where there is a GPU, a test that forks ranks runs in a process that sees none.

    A process that has used CUDA, or autograd beside it, cannot be forked.
    """
    if "torch_ranks" not in pyfuncitem.fixturenames or not torch.cuda.is_available():
        return None
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout, done.stdout
    return True


@pytest.fixture
def torch_ranks(tmp_path):
    """``run(main, size)``: ``main(rank)`` in processes of a default process group; what each returned.

    An error in one is raised here.
    """

    def run(main, size):
        place = Path(tempfile.mkdtemp(dir=tmp_path))
        said = run_processes(with_torch(lambda group: (main(group.rank),)), size, place)
        errors = {rank: what for rank, what in enumerate(said) if not isinstance(what, tuple)}
        assert not errors, errors
        return [what[0] for what in said]

    return run


@pytest.fixture
def launch():
    """Run a Python program on n processes under mpirun or torchrun; returns the finished process."""

    def run(program, ranks, launcher="mpirun", timeout=120, arguments=(), **env):
        python_bin = os.path.dirname(sys.executable)
        if launcher == "mpirun":
            command = ["mpirun", "--oversubscribe", "-n", str(ranks), sys.executable]
            if os.geteuid() == 0:
                command.insert(1, "--allow-run-as-root")
        else:
            command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        return subprocess.run(
            [*command, program, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={
                **os.environ,
                "PATH": f"{python_bin}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                **env,
            },
        )

    return run
