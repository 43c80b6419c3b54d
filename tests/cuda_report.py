"""What the compiler made of the CUDA kernels: registers, stack, spills, and required instructions.

    python tests/cuda_report.py [80 90a 100]

Prints one row for each kernel and target, and exits with 1 on a spill, on a stack frame larger than the
record of a failed wait, where an expected instruction is missing, or where something slow is back: more
system-scope barriers than needed, additions in other GPUs' memory, a longer sum loop.
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

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)([^;]*);")
ROOT = Path(__file__).parent.parent
SOURCE = "csrc/cuda/launch.cu"
MOST_STACK = 64  # bytes: a FailureRecord on its way to the host, off the hot path

# By kernel: instructions (SASS) without which it cannot be right, or not fast. Bulk copies to and from shared
# memory and their barriers from sm_90 on; everywhere system-scope loads, and fences before released words.
WORDS = ["LDG.E.64.STRONG.SYS", "MEMBAR.*.SYS"]
COUNT = "ATOMG.E.ADD.64.STRONG.GPU"  # of this rank's workers: the last one speaks for all
EXPECTED = {
    "plan_kernel": [*WORDS, "STG.E.64.STRONG.SYS"],
    "group_plan_kernel": [*WORDS, "STG.E.64.STRONG.SYS"],
    "rows_kernel": [*WORDS, COUNT, "STG.E.64.STRONG.SYS"],
    "waves_kernel": [*WORDS, COUNT, "STG.E.64.STRONG.SYS"],
    "combine_kernel": [*WORDS, COUNT, "STG.E.64.STRONG.SYS"],
}
EXPECTED_BULK = {
    "rows_kernel": ["UBLKCP.S.G", "UBLKCP.G.S", "SYNCS.PHASECHK.*TRYWAIT", "FENCE.VIEW.ASYNC.G"],
    "waves_kernel": ["UBLKCP.S.G", "UBLKCP.G.S", "SYNCS.PHASECHK.*TRYWAIT", "FENCE.VIEW.ASYNC.G"],
    "combine_kernel": ["UBLKCP.S.G", "SYNCS.PHASECHK.*TRYWAIT", "FENCE.VIEW.ASYNC.G"],
}

# What may not come back. The most system-scope barriers in a kernel, by target: each waits until everything
# that this SM has written is seen everywhere.
# Three of them are for the words of a wait that lasts.
MOST_SYSTEM_BARRIERS = {"plan_kernel": {80: 10, 90: 10, 100: 10}}
# Additions that wait for their sum: the counts of workers, and where words go to other nodes, the tickets of
# posts. More would be a grid barrier's.
MOST_ANSWERED_ADDITIONS = {
    "rows_kernel<WarpWorker>": 3,
    "rows_kernel<InternodeWorker>": 7,
    "combine_kernel<Bf16, WarpWorker>": 4,
    "waves_kernel": 8,
}
# Instructions for each 16 bytes of a row in the loops that sum, by target: of sums, where eight are the
# weight's; and of sums of parts, which are rounded in the loop, though not each time.
MOST_A_PIECE = {"combine_kernel<Bf16, WarpWorker>": {80: (30, 62), 90: (42, 88), 100: (42, 88)}}


@dataclass(frozen=True)
class Instruction:
    """Its address, name and operands."""

    at: int
    op: str
    operands: str


@dataclass(frozen=True)
class Loop:
    """The instructions between a backward branch and its target."""

    first: int
    last: int
    ops: tuple[str, ...]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, op)) for op in self.ops)

    def encloses(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def loops_with(code: list[Instruction], pattern: str) -> list[Loop]:
    """The loops that have an instruction like this one, without those around them."""
    found = set()
    for i in code:
        target = re.search(r"0x([0-9a-f]+)", i.operands) if i.op.split(".")[0] == "BRA" else None
        if target and (first := int(target[1], 16)) < i.at:
            found.add(Loop(first, i.at, tuple(j.op for j in code if first <= j.at <= i.at)))
    having = [loop for loop in found if loop.count(pattern)]
    return [loop for loop in having if not any(loop.encloses(other) for other in having)]


@dataclass
class Kernel:
    """One kernel on one target."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    code: list[Instruction] = field(default_factory=list)

    @property
    def base(self) -> str:
        return self.name.split("<")[0]

    @property
    def target(self) -> int:
        return int(re.sub(r"\D", "", self.arch))

    @property
    def instructions(self) -> Counter[str]:
        return Counter(i.op for i in self.code)

    def system_barriers(self) -> int:
        return sum(n for op, n in self.instructions.items() if re.match(r"MEMBAR.*\.SYS", op))

    def answered_additions(self) -> int:
        return sum(n for op, n in self.instructions.items() if re.match(r"ATOMG.*\.ADD\.64", op))

    def remote_additions(self) -> int:
        return sum(n for op, n in self.instructions.items() if re.match(r"(RED|ATOM).*ADD.*\.SYS", op))

    def a_piece(self, *, of_parts: bool) -> list[float]:
        """Instructions for 16 bytes of a row, in each loop that sums: it loads pieces, adds and stores none.

        Loops that load other things of 16 bytes, such as what an operation is called, add no fractions. Those
        that sum parts round.
        """
        load = r"LDS\.128" if self.target >= 90 else r"LDG\.E\.128"
        loops = [loop for loop in loops_with(self.code, load) if not loop.count(r"STG\.E\.128")]
        sums = [loop for loop in loops if loop.count(r"[FDH]ADD") and bool(loop.count("F2FP")) == of_parts]
        return sorted(len(loop.ops) / loop.count(load) for loop in sums)

    def slow(self) -> list[str]:
        """Slow code that had been mended and is back."""
        found = []
        barriers, most = self.system_barriers(), MOST_SYSTEM_BARRIERS.get(self.base, {}).get(self.target)
        if most is not None and barriers > most:
            found.append(f"{barriers} system-scope barriers, not {most}")
        if self.remote_additions():
            found.append(f"{self.remote_additions()} additions in memory that other GPUs may have")
        additions, most = self.answered_additions(), MOST_ANSWERED_ADDITIONS.get(self.name)
        if most is not None and additions > most:
            found.append(f"{additions} additions that wait for their sum, not {most}: a grid barrier?")
        limits = MOST_A_PIECE.get(self.name, {}).get(self.target, ())
        for of_parts, longest in enumerate(limits):
            pieces = self.a_piece(of_parts=bool(of_parts))
            if not pieces or pieces[-1] > longest:
                what = "sums of parts" if of_parts else "sums"
                found.append(f"{what} take {pieces} instructions for 16 bytes, not {longest}")
        return found

    def faults(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes of registers spilled")
        if self.stack > MOST_STACK:
            found.append(f"a stack frame of {self.stack} bytes")
        if not self.code:
            return found
        wanted = EXPECTED.get(self.base, [])
        if self.target >= 90:
            wanted = wanted + EXPECTED_BULK.get(self.base, [])
        for pattern in wanted:
            if not any(re.match(pattern, op) for op in self.instructions):
                found.append(f"no {pattern}")
        return found + self.slow()

    def figures(self) -> list[str]:
        """For the table, as its head names them."""
        known = [f"sm_{self.arch}", self.name, *map(str, (self.registers, self.stack, self.spills))]
        if not self.code:
            return [*known, "?", "?", "?", "?"]
        local = sum(n for op, n in self.instructions.items() if op.startswith(("LDL", "STL")))
        pieces = self.a_piece(of_parts=False) if self.base == "combine_kernel" else []
        span = " to ".join(dict.fromkeys(f"{n:.0f}" for n in (pieces[:1] + pieces[-1:])))
        return [*known, str(len(self.code)), str(local), str(self.system_barriers()), span]


def kernel_name(mangled: str) -> str:
    """commlib::cuda::combine_kernel<commlib::Bf16>(...) -> combine_kernel<Bf16>."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(.*", "", plain).replace("void ", "")
    return re.sub(r"\w+::", "", plain)


def compile_for(arch: str, target: Path) -> dict[str, Kernel]:
    """Compile the kernels for one target, and read ptxas's report on them."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import nvcc

    if nvcc.CUDA_HOME is None:
        raise SystemExit("no nvcc found: nothing to report on")
    nvcc.ARCHS = [arch]
    command = nvcc.nvcc_command(SOURCE, target, "-Xptxas=-v")
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


def read_instructions(cuobjdump: str, binary: Path, kernels: dict[str, Kernel]) -> None:
    path = {"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"}  # it calls nvdisasm
    command = [cuobjdump, "-sass", str(binary)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=path)
    current = None
    for line in run.stdout.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            current = kernels.get(found[1])
        elif current and (found := INSTRUCTION.match(line)):
            current.code.append(Instruction(int(found[1], 16), found[2], found[3]))


def main() -> int:
    archs = sys.argv[1:] or ["80", "90a", "100"]
    cuobjdump = find_cuobjdump()
    table = Table(
        "target", "kernel", "registers", "stack", "spills", "instructions", "local", "SYS", "16 B", "faults"
    )
    bad = False
    for arch in archs:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernels.o"
            kernels = compile_for(arch, binary)
            if cuobjdump:
                read_instructions(cuobjdump, binary, kernels)
        for k in sorted(kernels.values(), key=lambda k: k.name):
            faults = k.faults()
            bad = bad or bool(faults)
            table.add_row(*k.figures(), ", ".join(faults))
    console = Console(width=140)
    console.print(table)
    console.print(
        "SYS: system-scope barriers; 16 B: instructions for 16 bytes of a row in the loops that sum"
    )
    if not cuobjdump:
        console.print("instructions were not looked at: cuobjdump is missing (requirements-dev.txt)")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
