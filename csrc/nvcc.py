"""How the kernels are compiled, and with which CUDA toolkit: for setup.py and the tests in C++.

    python3 csrc/nvcc.py SOURCE TARGET     # an object, for COMMLIB_CUDA_ARCHS
    python3 csrc/nvcc.py                   # prints the toolkit's folder, nothing if there is none

Needs no packages. setup.py says what the variables mean.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ARCHS = os.environ.get("COMMLIB_CUDA_ARCHS", "80 90 100").split()
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]  # "unroll" is nvcc's
if os.environ.get("COMMLIB_WERROR", "") not in ("", "0"):
    WARNINGS.append("-Werror")


def find_cuda_home() -> Path | None:
    """The CUDA toolkit to build with, or None."""
    if ARCHS == ["none"]:
        return None
    nvcc = shutil.which("nvcc")
    # A wrapper on the PATH may lie outside the toolkit: what it says of itself counts.
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        candidates.insert(2, str(Path(nvcc).resolve().parent.parent))
    for home in filter(None, candidates):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime_api.h").exists():
            return Path(home)
    return None


CUDA_HOME = find_cuda_home()


def gencodes(archs: list[str]) -> list[str]:
    """Machine code for each target, and PTX 9.0 for GPUs yet to come."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*codes, "-gencode=arch=compute_90,code=compute_90"] if "90" in archs else codes


def nvcc_command(source: str, target: Path, *options: str) -> list[str]:
    """How kernels are compiled. -fmad=false: multiply and add stay apart, for the bits of the CPU backend."""
    return [
        str(CUDA_HOME / "bin/nvcc"),
        *("-std=c++17", "-O3", "-fmad=false", "-Icsrc", f"--threads={os.cpu_count() or 1}"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden," + ",".join(WARNINGS)),
        *options,
        *gencodes(ARCHS),
        *("-c", source, "-o", str(target)),
    ]


def main(arguments: list[str]) -> int:
    if not arguments:
        print(CUDA_HOME or "")
        return 0
    if CUDA_HOME is None:
        print("no nvcc found (PATH, CUDA_HOME)", file=sys.stderr)
        return 1
    source, target = arguments
    return subprocess.run(nvcc_command(source, Path(target))).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
