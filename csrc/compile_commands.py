"""Writes compile_commands.json, which editors (clangd) and clang-tidy read: how each C++ source is compiled.

    python csrc/compile_commands.py    # in the repository's root

The modules' commands come from setup.py, those of the tests in C++ from their makefiles: nothing is compiled,
and no flag is written here again. Kernels are the exception: clang has other options for CUDA than nvcc.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import setuptools

sys.path.insert(0, str(Path(__file__).parent.parent))
from nvcc import ARCHS, CUDA_HOME

import setup

ROOT = Path(__file__).parent.parent
# Makefiles, and targets that compile the tests beside each.
TESTS = {
    "tests/cpp/sanitize.mk": ["build/sanitize/asan"],
    "tests/simt/simt.mk": ["build/simt/kernels-bulk", "build/simt/backend-bulk"],
}
if CUDA_HOME:
    TESTS["tests/cpp/gpu/gpu.mk"] = ["build/gpu-cpp/protocol-tests", f"GPU_CPP_CUDA={CUDA_HOME}"]


class RecordCommands(setup.BuildExtensions):
    """A build that runs nothing, and remembers what it would have run."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # whatever is up to date
        self.commands: list[list[str]] = []

    def build_extensions(self) -> None:
        self.compiler.spawn = self.compiler.call = self.remember  # older and newer setuptools
        super().build_extensions()

    def remember(self, command: list[str], **_: object) -> None:
        self.commands.append(list(command))

    def run(self) -> None:
        super(setup.BuildExtensions, self).run()

    def compile_kernels(self, source: str) -> str:
        cuda = [f"--cuda-path={CUDA_HOME}", *(f"--cuda-gpu-arch=sm_{arch}" for arch in ARCHS[-1:])]
        self.commands.append(["clang++", *cuda, "-std=c++17", "-Icsrc", "-c", source])
        return source


def source_of(command: list[str]) -> str:
    (source,) = (word for word in command if word.endswith((".cc", ".cu")))
    return source


def of_modules() -> list[list[str]]:
    with tempfile.TemporaryDirectory() as place:
        build = RecordCommands(setuptools.Distribution({"ext_modules": setup.extensions}))
        build.build_lib = build.build_temp = place
        build.ensure_finalized()
        build.run()
    return build.commands


def of_tests(makefile: str, targets: list[str]) -> list[list[str]]:
    make = ["make", "--dry-run", "--always-make", "-f", makefile, *targets]
    said = subprocess.run(make, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line) for line in said.splitlines() if " -c " in line]
    return [command for command in commands if source_of(command).startswith("tests/")]


def main() -> None:
    commands = [command for command in of_modules() if "-c" in command]
    for makefile, targets in TESTS.items():
        commands += of_tests(makefile, targets)
    by_source: dict[str, list[str]] = {}
    for command in commands:
        by_source.setdefault(source_of(command), command)
    entries = [{"directory": str(ROOT), "file": f, "arguments": c} for f, c in by_source.items()]
    (ROOT / "compile_commands.json").write_text(json.dumps(entries, indent=1) + "\n")
    print(f"compile_commands.json: {len(entries)} sources")


if __name__ == "__main__":
    main()
