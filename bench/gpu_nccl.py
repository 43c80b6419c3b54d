"""Measure dispatch and combine over commlib, NCCL and CuPy's NCCL: one process and one GPU for each rank.

    torchrun --nproc-per-node 8 bench/gpu_nccl.py
    mpirun -n 8 python bench/gpu_nccl.py

NCCL refuses two ranks on one GPU; there bench/gpu.py compares with plain PyTorch. A process by itself runs
all of it on one rank. The GPUs' clocks cannot be compared, so times are the host's, from the first rank's
begin to the moment when the last rank's GPU is done, as bench/dispatch_combine.py takes them.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from common import Launch, Stats, add_shape_arguments
from dispatch_combine import Samples, measure_throughput
from gpu import NO_GPU
from gpu_baselines import CupyNcclBaseline, NcclBaseline
from report import RESULTS, gpu, host, show, slug, table, write_json
from systems import Baseline, Commlib, CommlibZeroCopy, System
from torch import Tensor
from workload import Job, Received, Shape

import commlib
from commlib import cuda

NCCL, CUPY = "NCCL", "CuPy's NCCL"
QUICK = {"tokens": 64, "hidden": 512, "experts": 16, "topk": 4, "iters": 3, "warmup": 1}


class UntilDone(System):
    """A system whose operations end when the GPU has done them."""

    def __init__(self, system: System) -> None:
        self.name, self._system = system.name, system

    def dispatch(self, job: Job) -> Received:
        received = self._system.dispatch(job)
        torch.cuda.synchronize()
        return received

    def place(self, job: Job) -> Tensor:
        y = self._system.place(job)
        torch.cuda.synchronize()
        return y

    def combine(self, y: Tensor) -> Tensor:
        out = self._system.combine(y)
        torch.cuda.synchronize()
        return out

    def release(self) -> None:
        self._system.release()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, tokens=4096)
    parser.add_argument("--num-sms", type=int, help="commlib's; default: its own choice")
    parser.add_argument("--iters", type=int)
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--quick", action="store_true", help="small sizes instead of the defaults")
    parser.add_argument("--json", type=Path, help="default: bench/results/, named by device and date")
    parser.set_defaults(experts=256, iters=12, warmup=3)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def cupy_is_missing() -> str:
    """Why CuPy's NCCL cannot be used; empty if it can."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        return f"CuPy: {error}"
    return "" if nccl.available else "CuPy finds no NCCL"


@contextmanager
def open_systems(
    launch: Launch, shape: Shape, device: torch.device, num_sms: int | None
) -> Iterator[list[System]]:
    """All systems that can run here. Called by all ranks."""
    sizes = shape.sizes
    group = dist.new_group(backend="nccl")
    with commlib.ExpertParallel(launch.ranks, device=device, num_sms=num_sms, slots=4, **sizes) as ep:
        systems = [
            CommlibZeroCopy(ep),
            Commlib(ep),
            Baseline(NCCL, NcclBaseline(group, device=device, **sizes)),
        ]
        if not any(launch.gather(cupy_is_missing())):
            systems.append(Baseline(CUPY, CupyNcclBaseline(launch, device=device, **sizes)))
        yield [UntilDone(system) for system in systems]
    dist.destroy_process_group(group)


def rows_of_table(samples: Samples, row_bytes: int, rows: float) -> Iterator[list[list[str]]]:
    """A section for each operation."""
    for operation in ("dispatch", "combine"):
        stats = {name: Stats.of(times[operation]) for name, times in samples.items()}
        yield [
            [
                operation,
                name,
                found.text(unit=1e-3, digits=2),
                f"{rows * row_bytes / found.median / 1e9:.1f}",
                f"{stats[NCCL].median / found.median:.1f}x",
            ]
            for name, found in stats.items()
        ]


def publish(launch: Launch, args: argparse.Namespace, samples: Samples, rows: float) -> None:
    facts = host() | gpu() | {"ranks": launch.size, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    title = (
        f"{launch.size} ranks, each on one {facts['gpu']}, T={args.tokens} H={args.hidden} bf16, "
        f"top-{args.topk} of {args.experts} experts, NCCL {facts['nccl']}, median of {args.iters}"
    )
    columns = ["", "system", "ms (min-max)", "GB/s/rank", "x NCCL"]
    show(table(title, columns, list(rows_of_table(samples, args.hidden * 2, rows))))
    if missing := cupy_is_missing():
        show(f"{CUPY}: not run: {missing}")
    name = f"nccl-{slug(facts['gpu'])}-r{launch.size}-{datetime.date.today()}.json"
    path = args.json or RESULTS / name
    config = vars(args) | {"json": str(path)}
    write_json(path, {"config": config, "machine": facts, "samples_s": samples, "rows": rows})
    show(f"every sample: {path}")


def why_not_nccl(ranks: int) -> str:
    """Why this many ranks of one host cannot run NCCL; empty if they can."""
    if not cuda.is_available():
        return f"needs a GPU: {cuda.why_not()}"
    gpus = torch.cuda.device_count()
    return "" if gpus >= ranks else f"NCCL needs a GPU for each rank: {ranks} ranks, {gpus} here"


def main() -> None:
    args = parse_arguments()
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk, torch.bfloat16, args.seed)
    with Launch.session() as launch:
        if why := why_not_nccl(launch.size):
            if launch.rank == 0:
                print(f"bench/gpu_nccl.py: {why}", file=sys.stderr)
            sys.exit(NO_GPU)
        device = torch.device("cuda", launch.rank)
        torch.cuda.set_device(device)
        job = Job.build(shape, launch.rank, launch.size, device)
        with open_systems(launch, shape, device, args.num_sms) as systems:
            samples, wrong = measure_throughput(launch, job, systems, args.iters, args.warmup)
        rows = statistics.mean(launch.gather(len(job.expected.rows)))
        if launch.rank == 0:
            publish(launch, args, samples, rows)
        if wrong := list(chain(*launch.gather(wrong))):
            sys.exit("\n".join(["WRONG RESULTS", *wrong]) if launch.rank == 0 else 1)


if __name__ == "__main__":
    main()
