"""Shared by all tests."""

import os
import subprocess
import sys

import pytest
import torch

# Ranks are threads and processes here, many more than cores.
torch.set_num_threads(1)


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
