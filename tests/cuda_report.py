"""What the compiler made of the CUDA kernels: registers, stack, spills, and instructions that must be there.

    python tests/cuda_report.py [80 90a 100]

Prints one row for each kernel and target, and exits with 1 on a spill, on a stack frame that is more than the
record of a failed wait, or where an expected instruction is missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)")
ROOT = Path(__file__).parent.parent
SOURCE = "csrc/cuda/launch.cu"
MOST_STACK = 64  # bytes: a FailureRecord on its way to the host, off the hot path

# By kernel: instructions (SASS) without which it cannot be right, or not fast. Bulk copies to and from shared
# memory and their barriers from sm_90 on; everywhere system-scope loads, and fences before released words.
WORDS = ["LDG.E.64.STRONG.SYS", "MEMBAR.*.SYS"]
EXPECTED = {
    "plan_kernel": [*WORDS, "STG.E.64.STRONG.SYS"],
    "rows_kernel": [*WORDS, "RED(G)?.E.ADD.64.STRONG.SYS"],
    "waves_kernel": [*WORDS, "RED(G)?.E.ADD.64.STRONG.SYS"],
    "combine_kernel": [*WORDS, "RED(G)?.E.ADD.64.STRONG.SYS", "STG.E.64.STRONG.SYS"],
}
EXPECTED_BULK = {
    "rows_kernel": ["UBLKCP.S.G", "UBLKCP.G.S", "SYNCS.PHASECHK.*TRYWAIT", "FENCE.VIEW.ASYNC.G"],
    "waves_kernel": ["UBLKCP.S.G", "UBLKCP.G.S", "SYNCS.PHASECHK.*TRYWAIT", "FENCE.VIEW.ASYNC.G"],
    "combine_kernel": ["UBLKCP.S.G", "SYNCS.PHASECHK.*TRYWAIT", "FENCE.VIEW.ASYNC.G"],
}


@dataclass
class Kernel:
    """One kernel on one target."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def base(self) -> str:
        return self.name.split("<")[0]

    def faults(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes of registers spilled")
        if self.stack > MOST_STACK:
            found.append(f"a stack frame of {self.stack} bytes")
        if not self.instructions:
            return found
        wanted = EXPECTED.get(self.base, [])
        if int(re.sub(r"\D", "", self.arch)) >= 90:
            wanted = wanted + EXPECTED_BULK.get(self.base, [])
        for pattern in wanted:
            if not any(re.match(pattern, op) for op in self.instructions):
                found.append(f"no {pattern}")
        return found


def kernel_name(mangled: str) -> str:
    """commlib::cuda::combine_kernel<commlib::Bf16>(...) -> combine_kernel<Bf16>."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(.*", "", plain).replace("void ", "")
    return re.sub(r"\w+::", "", plain)


def compile_for(arch: str, target: Path) -> dict[str, Kernel]:
    """Compile the kernels for one target, and read what ptxas says of them."""
    sys.path.insert(0, str(ROOT))
    import setup

    if setup.CUDA_HOME is None:
        raise SystemExit("no nvcc found: nothing to report on")
    setup.ARCHS = [arch]
    command = setup.nvcc_command(SOURCE, target, "-Xptxas=-v")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    kernels: dict[str, Kernel] = {}
    current = None
    for line in run.stderr.splitlines():
        if found := re.search(r"Function properties for (\S+)", line):
            current = None
            if "_kernel" in found[1]:
                current = kernels.setdefault(found[1], Kernel(kernel_name(found[1]), arch))
        elif current and (found := re.search(r"(\d+) bytes stack.*?(\d+) bytes spill.*?(\d+) bytes", line)):
            current.stack, current.spills = int(found[1]), int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            list(kernels.values())[-1].registers = int(found[1])
    return kernels


def find_cuobjdump() -> str | None:
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"
    return shutil.which("cuobjdump", path=str(wheel)) or shutil.which("cuobjdump")


def count_instructions(cuobjdump: str, binary: Path, kernels: dict[str, Kernel]) -> None:
    path = {"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"}  # it calls nvdisasm
    command = [cuobjdump, "-sass", str(binary)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=path)
    current = None
    for line in run.stdout.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            current = kernels.get(found[1])
        elif current and (found := INSTRUCTION.match(line)):
            current.instructions[found[1]] += 1


def main() -> int:
    archs = sys.argv[1:] or ["80", "90a", "100"]
    cuobjdump = find_cuobjdump()
    table = Table("target", "kernel", "registers", "stack", "spills", "instructions", "local", "faults")
    bad = False
    for arch in archs:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernels.o"
            kernels = compile_for(arch, binary)
            if cuobjdump:
                count_instructions(cuobjdump, binary, kernels)
        for k in sorted(kernels.values(), key=lambda k: k.name):
            faults = k.faults()
            bad = bad or bool(faults)
            local = sum(n for op, n in k.instructions.items() if op.startswith(("LDL", "STL")))
            total = sum(k.instructions.values())
            table.add_row(
                f"sm_{arch}",
                k.name,
                *map(str, (k.registers, k.stack, k.spills)),
                str(total) if cuobjdump else "?",
                str(local) if cuobjdump else "?",
                ", ".join(faults),
            )
    console = Console(width=120)
    console.print(table)
    if not cuobjdump:
        console.print("instructions were not looked at: cuobjdump is missing (requirements-dev.txt)")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
