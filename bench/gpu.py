"""Measure dispatch and combine on one GPU: its ranks are threads, the "link" is the GPU's own memory.

    python bench/gpu.py                 # under 3 minutes
    python bench/gpu.py --quick         # small sizes, to see that it works
    python bench/gpu.py --budget 120    # leaves out what does not fit into 120 seconds, and says what

For each number of ranks and of SMs a rank, commlib and plain PyTorch take turns on the same routing, in
changing order; every answer is checked in the same run, before anything is timed. What the columns mean:

kernels    (in the files) ms that commlib's kernels of one rank take in one operation, waits for other ranks
           included, by PyTorch's profiler, in separate iterations after everything that is timed. They leave
           out what the host adds: ranks that are threads of one process take turns in Python. Another table
           has them kernel by kernel, on the screen, too.
GB/s/rank  rows that a rank receives (dispatch; combine: that it sends back), each counted once, times their
           bytes, over the time. The rows that a rank sends to itself are among them.
GB/s/SM    the same for one of the rank's SMs.
of copy    (rows read + rows written by all ranks) * bytes of a row, over the time, as a share of what a large
           copy reads and writes in the same run. Dispatch must read each token once and write a row for each
           rank that it goes to; combine the reverse. Copies that a layout or a system makes do not count.

"dispatch again" has a handle, and so neither plan nor counts nor the host's wait for them. Results are
written after each number of ranks, so a run that is cut short keeps what it had.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.gpu_measure import Plan, Record, measure, watch
from bench.harness.facts import slug
from bench.harness.kernels import ALL, Key
from bench.harness.machine import gpu, host
from bench.harness.report import NO_GPU, Titled, markdown, show, table
from bench.harness.samples import RESULTS, options, write, write_samples
from bench.harness.stats import Stats
from bench.harness.workload import Shape, WrongResults, add_shape_arguments, require_equal_blocks
from bench.systems.commlib import OWNED, ZERO_COPY
from bench.systems.one_gpu import GROUPED, OPERATIONS, PLAIN, TUNED
from commlib import cuda
from commlib.cli.measuring import let_ranks_share_a_gpu

COLUMNS = ("", "system", "SMs", "ms (min-max)", "kernels", "GB/s/rank", "GB/s/SM", "x tuned", "of copy")
KERNEL_COLUMNS = ("", "system", "SMs", "kernel", "launches", "µs (min-max)", "µs an operation")
GRACE_SECONDS = 45  # torchrun gives its ranks 30
ORDER = (ZERO_COPY, OWNED, GROUPED, PLAIN, TUNED)
QUICK = {"tokens": 64, "hidden": 512, "experts": 16, "topk": 4, "ranks": [2], "num_sms": [1], "iters": 3}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, tokens=4096)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--num-sms", type=int, nargs="+", help="of a rank; a last run takes all there are")
    parser.add_argument("--iters", type=int)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--copy-mib", type=int, default=1024, help="size of the plain copy")
    parser.add_argument("--profile-iters", type=int, default=3, help="for kernel times; 0: none")
    parser.add_argument("--budget", type=float, help="seconds; what would not fit is left out and named")
    parser.add_argument("--quick", action="store_true", help="small sizes instead of the defaults")
    parser.add_argument("--json", type=Path, help="default: bench/results/local/, named by device and date")
    parser.set_defaults(experts=256, ranks=[4, 8], num_sms=[2, 4, 6, 8, 12, 16], iters=12)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK, warmup=1, copy_mib=16)
    args = parser.parse_args(argv)
    if min(args.iters, *args.ranks, *args.num_sms) < 1:
        parser.error("--iters, --ranks and --num-sms are at least 1")
    for ranks in args.ranks:
        require_equal_blocks(args.experts, ranks)
    if args.profile_iters < 0 or (args.budget is not None and args.budget <= 0):
        parser.error("--profile-iters is at least 0, and --budget more")
    return args


def plan_for(ranks: int, args: argparse.Namespace, sms: int, deadline: float | None = None) -> Plan:
    """The measurements with that many ranks: the SMs a rank that were asked for, where there are as many, and
    all there are."""
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk, torch.bfloat16, args.seed)
    num_sms = sorted({n for n in args.num_sms if n * ranks <= sms} | {sms // ranks})
    return Plan(
        shape,
        ranks,
        num_sms,
        args.iters,
        args.warmup,
        args.copy_mib << 20,
        profile_iters=args.profile_iters,
        deadline=deadline,
    )


def rows_of_table(operation: str, plan: Plan, record: Record) -> Iterator[list[str]]:
    row_bytes = plan.shape.hidden * plan.shape.dtype.itemsize
    touched = plan.ranks * (plan.shape.tokens + record.rows) * row_bytes
    copy = Stats.of(record.copies).median
    stats = {key: Stats.of(seconds) for key, seconds in record.seconds.items() if key[2] == operation}
    tuned = stats.get((TUNED, None, operation))
    kernels = kernel_seconds(record)
    for key, found in sorted(stats.items(), key=lambda item: ORDER.index(item[0][0])):
        system, num_sms, _ = key
        rate = record.rows * row_bytes / found.median / 1e9
        yield [
            operation,
            system,
            str(num_sms or ""),
            found.text(unit=1e-3, digits=2),
            f"{kernels[key] * 1e3:.2f}" if key in kernels else "",
            f"{rate:.1f}",
            f"{rate / num_sms:.1f}" if num_sms else "",
            f"{tuned.median / found.median:.1f}x" if tuned else "",
            f"{touched / found.median / copy:.0%}",
        ]


def kernel_seconds(record: Record) -> dict[Key, float]:
    """The time of a rank's kernels in one operation, the median of the profiled iterations."""
    seconds: dict[Key, list[float]] = {}
    for series in record.kernels:
        if series.kernel != ALL:
            key = (series.system, series.num_sms, series.operation)
            before = seconds.get(key, [0.0] * len(series.per_operation))
            seconds[key] = [a + b for a, b in zip(before, series.per_operation, strict=True)]
    return {key: Stats.of(found).median for key, found in seconds.items()}


def kernel_table(plan: Plan, record: Record) -> Titled:
    """Every kernel of every operation. Launches are those of one rank in one operation."""
    title = (
        f"Kernels, {plan.ranks} ranks, {plan.profile_iters} iterations of their own under the profiler. "
        f'"{ALL}": from the first begin to the last end, with what the host does between'
    )
    sections = [
        [
            [
                operation,
                series.system,
                str(series.num_sms or ""),
                series.kernel,
                "" if series.kernel == ALL else f"{series.launches:g}",
                Stats.of(series.seconds).text(unit=1e-6, digits=0),
                f"{Stats.of(series.per_operation).median * 1e6:.0f}",
            ]
            for series in record.kernels
            if series.operation == operation
        ]
        for operation in OPERATIONS
    ]
    return title, KERNEL_COLUMNS, sections


def table_of(plan: Plan, record: Record, facts: dict[str, Any]) -> Titled:
    """Title, columns and sections."""
    shape = plan.shape
    title = (
        f"{plan.ranks} ranks on one {facts['gpu']} ({facts['sms']} SMs), T={shape.tokens} H={shape.hidden} "
        f"bf16, top-{shape.topk} of {shape.experts} experts, {record.rows:,.0f} rows to a rank, median of "
        f"{plan.iters}; a copy moves {Stats.of(record.copies).median / 1e9:,.0f} GB/s"
    )
    sections = [list(rows_of_table(operation, plan, record)) for operation in OPERATIONS]
    if record.kernels:
        return title, COLUMNS, sections
    place = COLUMNS.index("kernels")
    fewer = [[[*row[:place], *row[place + 1 :]] for row in rows] for rows in sections]
    return title, [*COLUMNS[:place], *COLUMNS[place + 1 :]], fewer


def run_processes(args: argparse.Namespace, path: Path, deadline: float | None) -> str:
    """Compare with NCCL and others, in a process for each GPU; or say why not."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return (
            "not run, they need a GPU for each rank, and there is 1 (bench/dispatch_combine.py --device cuda)"
        )
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        return "not run, --budget is spent"
    program = Path(__file__).with_name("dispatch_combine.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    names = ("tokens", "hidden", "experts", "topk", "seed", "iters", "warmup")
    options = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    options += ["--device", "cuda", "--json", str(path.with_suffix(".nccl.json"))]
    running = subprocess.Popen([sys.executable, *launcher, str(program), *options])
    try:
        return f"bench/dispatch_combine.py --device cuda ended with status {running.wait(left)}"
    except subprocess.TimeoutExpired:
        _end(running)
        return "cut, --budget is spent"


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """End torchrun and its ranks, which it ends when asked to stop, but not when killed."""
    launcher.terminate()
    try:
        launcher.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.wait()


def recorded(found: dict[str, Any]) -> list[tuple[Plan, Record]]:
    """What a run wrote, but for its kernels: by number of ranks."""
    measured = []
    args = argparse.Namespace(**found["config"])
    for ranks, facts in found["ranks"].items():
        record = Record(copies=facts["copy_bytes_per_s"], rows=facts["rows"])
        for series in found["series"]:
            if series["ranks"] == int(ranks):
                key = series["system"], series["num_sms"], series["operation"]
                record.seconds[key] = series["seconds"]
        measured.append((plan_for(int(ranks), args, found["machine"]["sms"]), record))
    return measured


@dataclass
class Findings:
    """The results so far, and how they are reported."""

    args: argparse.Namespace
    facts: dict[str, Any]
    path: Path
    measured: list[tuple[Plan, Record]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    others: str = "not run yet"

    def add(self, plan: Plan, record: Record) -> None:
        """Print the results of one number of ranks, and write everything."""
        self.left_out += [f"{plan.ranks} ranks, {text}" for text in record.left_out]
        if record.seconds:
            self.measured.append((plan, record))
            show(table(*table_of(plan, record, self.facts)))
        self.write()

    def add_kernels(self, place: int, record: Record) -> None:
        """Replace that record in `measured`, print its kernels, and write everything."""
        plan, before = self.measured[place]
        self.measured[place] = plan, record
        self.left_out += [f"{plan.ranks} ranks, {text}" for text in record.left_out[len(before.left_out) :]]
        if record.kernels:
            show(table(*kernel_table(plan, record)))
        self.write()

    def notes(self) -> list[str]:
        """Notes below the tables."""
        notes = [f"NCCL and others: {self.others}"]
        notes += [
            f"kernel times, {plan.ranks} ranks: none, {record.no_kernels}"
            for plan, record in self.measured
            if not record.kernels
        ]
        if self.left_out:
            notes.append(f"left out, --budget {self.args.budget:g}: {'; '.join(self.left_out)}")
        return [*notes, self._software()]

    def write(self) -> None:
        """The tables as Markdown, and every sample as JSON."""
        tables = []
        for plan, record in self.measured:
            tables.append(markdown(*table_of(plan, record, self.facts)))
            if record.kernels:
                tables.append(markdown(*kernel_table(plan, record)))
        write_samples(self.path, self._as_json())
        notes = [*self.notes(), f"[every sample]({self.path.name})"]
        write(self.path.with_suffix(".md"), "\n".join([*tables, *(f"{note}.\n" for note in notes)]))

    def _software(self) -> str:
        facts = self.facts
        return (
            f"commit {facts['commit']}, torch {facts['torch']}, CUDA {facts['cuda_of_torch']}, driver "
            f"{facts['driver']}, {facts['cpu']}"
        )

    def _as_json(self) -> dict[str, Any]:
        """Every sample, and what it depends on."""
        measured = self.measured
        return {
            "config": options(self.args),
            "machine": self.facts,
            "others": self.others,
            "left_out": self.left_out,
            "ranks": {
                str(plan.ranks): {
                    "rows": record.rows,
                    "copy_bytes_per_s": record.copies,
                    "no_kernels": record.no_kernels,
                }
                for plan, record in measured
            },
            "series": [asdict(series) for plan, record in measured for series in record.series(plan.ranks)],
            "kernels": [asdict(series) for _, record in measured for series in record.kernels],
        }


def measure_all(findings: Findings, deadline: float | None) -> None:
    """Measure each number of ranks, while time is left; then the kernels of each.

    Raises:
        WrongResults: naming system, rank and what was wrong.
    """
    for ranks in findings.args.ranks:
        plan = plan_for(ranks, findings.args, findings.facts["sms"], deadline)
        findings.add(plan, measure(plan))
    if findings.args.profile_iters:
        for place, (plan, record) in enumerate(findings.measured):
            findings.add_kernels(place, watch(plan, record))


def main(argv: Sequence[str] | None = None) -> None:
    let_ranks_share_a_gpu()
    args = parse_arguments(argv)
    if not cuda.is_available():
        print(f"bench/gpu.py needs a GPU: {cuda.why_not()}", file=sys.stderr)
        sys.exit(NO_GPU)
    deadline = None if args.budget is None else time.monotonic() + args.budget
    facts = host() | gpu()
    name = f"{slug(facts['gpu'])}-{datetime.date.today()}{'-quick' if args.quick else ''}.json"
    findings = Findings(args, facts, args.json or RESULTS / name)
    try:
        measure_all(findings, deadline)
    except WrongResults as wrong:
        sys.exit(f"WRONG RESULTS\n{wrong}")
    findings.others = run_processes(args, findings.path, deadline)
    findings.write()
    show(*findings.notes(), f"every sample: {findings.path}")


if __name__ == "__main__":
    main()
