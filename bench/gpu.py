"""Measure dispatch and combine on one GPU: its ranks are threads, the "link" is the GPU's own memory.

    python bench/gpu.py            # under 3 minutes
    python bench/gpu.py --quick    # small sizes, to see that it works

For each number of ranks and of SMs a rank, commlib and plain PyTorch take turns on the same routing, in
changing order; every answer is checked in the same run, before anything is timed. What the columns mean:

GB/s/rank  rows that a rank receives (dispatch; combine: that it sends back), each counted once, times their
           bytes, over the time. The rows that a rank sends to itself are among them.
GB/s/SM    the same for one of the rank's SMs.
of copy    (rows read + rows written by all ranks) * bytes of a row, over the time, as a share of what a large
           copy reads and writes in the same run. Dispatch must read each token once and write a row for each
           rank that it goes to; combine the reverse. Copies that a layout or a system makes do not count.

"dispatch again" has a handle, thus neither plan nor counts nor the host's wait for them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# CUDA reads them when it starts; see docs/gpu.md.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch
from common import Stats, add_shape_arguments
from gpu_measure import Plan, Record, measure
from gpu_systems import GROUPED, OPERATIONS, PLAIN, TUNED
from report import NO_GPU, RESULTS, Titled, gpu, host, markdown, show, slug, table, write_json
from systems import OWNED, ZERO_COPY
from workload import Shape, WrongResults

from commlib import cuda

COLUMNS = ("", "system", "SMs", "ms (min-max)", "GB/s/rank", "GB/s/SM", "x tuned", "of copy")
QUICK = {"tokens": 64, "hidden": 512, "experts": 16, "topk": 4, "ranks": [2], "num_sms": [1], "iters": 3}

Measured = list[tuple[Plan, Record]]


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
    parser.add_argument("--quick", action="store_true", help="small sizes instead of the defaults")
    parser.add_argument("--json", type=Path, help="default: bench/results/, named by device and date")
    parser.set_defaults(experts=256, ranks=[4, 8], num_sms=[2, 4, 6, 8, 12, 16], iters=12)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK, warmup=1, copy_mib=16)
    args = parser.parse_args(argv)
    if min(args.iters, *args.ranks, *args.num_sms) < 1 or any(args.experts % r for r in args.ranks):
        parser.error("--iters, --ranks and --num-sms are at least 1, and --ranks divide --experts")
    return args


def plan_for(ranks: int, args: argparse.Namespace, sms: int) -> Plan:
    """What is measured with that many ranks: the SMs a rank that were asked for, as far as there are so many,
    and all there are."""
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk, torch.bfloat16, args.seed)
    num_sms = sorted({n for n in args.num_sms if n * ranks <= sms} | {sms // ranks})
    return Plan(shape, ranks, num_sms, args.iters, args.warmup, args.copy_mib << 20)


def rows_of_table(operation: str, plan: Plan, record: Record) -> Iterator[list[str]]:
    row_bytes = plan.shape.hidden * plan.shape.dtype.itemsize
    touched = plan.ranks * (plan.shape.tokens + record.rows) * row_bytes
    copy = Stats.of(record.copies).median
    stats = {key: Stats.of(seconds) for key, seconds in record.seconds.items() if key[2] == operation}
    tuned = stats.get((TUNED, None, operation))
    order = (ZERO_COPY, OWNED, GROUPED, PLAIN, TUNED)
    for (system, num_sms, _), found in sorted(stats.items(), key=lambda item: order.index(item[0][0])):
        rate = record.rows * row_bytes / found.median / 1e9
        yield [
            operation,
            system,
            str(num_sms or ""),
            found.text(unit=1e-3, digits=2),
            f"{rate:.1f}",
            f"{rate / num_sms:.1f}" if num_sms else "",
            f"{tuned.median / found.median:.1f}x" if tuned else "",
            f"{touched / found.median / copy:.0%}",
        ]


def table_of(plan: Plan, record: Record, facts: dict[str, Any]) -> Titled:
    """Title, columns and sections."""
    shape = plan.shape
    title = (
        f"{plan.ranks} ranks on one {facts['gpu']} ({facts['sms']} SMs), T={shape.tokens} H={shape.hidden} "
        f"bf16, top-{shape.topk} of {shape.experts} experts, {record.rows:,.0f} rows to a rank, median of "
        f"{plan.iters}; a copy moves {Stats.of(record.copies).median / 1e9:,.0f} GB/s"
    )
    return title, COLUMNS, [list(rows_of_table(operation, plan, record)) for operation in OPERATIONS]


def run_nccl(args: argparse.Namespace, path: Path) -> str:
    """Measure against NCCL, in a process for each GPU; or say why not."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return "NCCL, CuPy's NCCL: not run, they need a GPU for each rank, and there is 1 (bench/gpu_nccl.py)"
    program = Path(__file__).with_name("gpu_nccl.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    arguments = ["--json", str(path.with_suffix(".nccl.json")), *(["--quick"] if args.quick else [])]
    done = subprocess.run([sys.executable, *launcher, str(program), *arguments], check=False)
    return f"NCCL, CuPy's NCCL: bench/gpu_nccl.py ended with status {done.returncode}"


def as_json(
    args: argparse.Namespace, facts: dict[str, Any], measured: Measured, nccl: str, path: Path
) -> dict[str, Any]:
    """Every sample, and what it depends on."""
    return {
        "config": vars(args) | {"json": str(path)},
        "machine": facts,
        "nccl": nccl,
        "ranks": {
            str(plan.ranks): {"rows": record.rows, "copy_bytes_per_s": record.copies}
            for plan, record in measured
        },
        "series": [asdict(series) for plan, record in measured for series in record.series(plan.ranks)],
    }


def publish(args: argparse.Namespace, facts: dict[str, Any], measured: Measured, path: Path) -> None:
    """Print the tables; write them as Markdown, and every sample as JSON."""
    tables = [table_of(plan, record, facts) for plan, record in measured]
    nccl = run_nccl(args, path)
    software = (
        f"commit {facts['commit']}, torch {facts['torch']}, CUDA {facts['cuda_of_torch']}, driver "
        f"{facts['driver']}, {facts['cpu']}"
    )
    for parts in tables:
        show(table(*parts))
    show(nccl, software, f"every sample: {path}")
    write_json(path, as_json(args, facts, measured, nccl, path))
    notes = f"{software}; [every sample]({path.name}).\n\n{nccl}.\n"
    path.with_suffix(".md").write_text("\n".join([*(markdown(*parts) for parts in tables), notes]))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not cuda.is_available():
        print(f"bench/gpu.py needs a GPU: {cuda.why_not()}", file=sys.stderr)
        sys.exit(NO_GPU)
    facts = host() | gpu()
    name = f"{slug(facts['gpu'])}-{datetime.date.today()}{'-quick' if args.quick else ''}.json"
    path = args.json or RESULTS / name
    measured: Measured = []
    for ranks in args.ranks:
        plan = plan_for(ranks, args, facts["sms"])
        try:
            measured.append((plan, measure(plan)))
        except WrongResults as wrong:
            sys.exit(f"WRONG RESULTS\n{wrong}")
        gc.collect()
        torch.cuda.empty_cache()  # the next ranks have other streams, to which its memory would be lost
    publish(args, facts, measured, path)


if __name__ == "__main__":
    main()
