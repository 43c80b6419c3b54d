"""What this machine has of all that commlib, its tests and its benchmarks use. Exits with 1 without a GPU."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata

PACKAGES = (
    *(
        "commlib-ep",
        "torch",
        "numpy",
        "triton",
        "cupy-cuda13x",
        "cupy-cuda12x",
        "mpi4py",
        "nvidia-nccl-cu13",
        "libucx-cu13",
    ),
    *(
        "pybind11",
        "setuptools",
        "pip",
        "pytest",
        "pytest-timeout",
        "hypothesis",
        "rich",
        "tqdm",
        "matplotlib",
    ),
)
PROGRAMS = (
    *(("nvcc", "--version"), ("gcc", "--version"), ("make", "--version"), ("cmake", "--version")),
    *(
        ("compute-sanitizer", "--version"),
        ("nsys", "--version"),
        ("ncu", "--version"),
        ("cuda-gdb", "--version"),
    ),
    *(("mpirun", "--version"), ("ucx_info", "-v")),
)
GPU_FIELDS = (
    "index,name,driver_version,memory.total,memory.used,compute_mode,clocks.max.sm,clocks.max.mem,power.limit"
)
LONGEST = 20  # seconds for a program to answer


def ask(*command: str) -> str:
    """A program's answer, or why there is none."""
    if not shutil.which(command[0]):
        return "none"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout.strip() or done.stderr.strip()) or f"exit status {done.returncode}"


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def say(name: str, value: object) -> None:
    print(f"{name:20} {value}", flush=True)


def main() -> int:
    say("system", platform.platform())
    say("glibc", " ".join(platform.libc_ver()))
    say("Python", f"{platform.python_version()} {sys.executable}")
    for package in PACKAGES:
        say(package, version_of(package))
    for command in PROGRAMS:
        lines = ask(*command).splitlines()
        say(command[0], next((line for line in lines if re.search(r"\d\.\d", line)), lines[0]))
    say("GPUs", ask("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv"))
    say("topology", "\n" + ask("nvidia-smi", "topo", "-m"))
    import torch

    say("CUDA of PyTorch", torch.version.cuda)
    say("NCCL of PyTorch", torch.cuda.nccl.version() if torch.cuda.is_available() else "none")
    if not torch.cuda.is_available():
        say("GPU", "none that PyTorch could use")
        return 1
    for index in range(torch.cuda.device_count()):
        say(f"GPU {index}", torch.cuda.get_device_properties(index))
    return 0


if __name__ == "__main__":
    sys.exit(main())
