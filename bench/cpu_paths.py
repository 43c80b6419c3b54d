"""Ranks on CPUs: commlib beside the best that is written with gloo and MPI, at several sizes, on two paths.

* "rank path": dispatch yields each row once, as it came, and combine sums rows of y that lie where the
  experts wrote them.
* "layer path", as a MoE layer calls it: dispatch yields rows grouped by local expert, each group padded to
  a multiple of eight, and combine takes the weights and rows of y that lie where the experts wrote them.

The best peer is the fastest of tuned gloo, MPI and MPI windows, by its median, for each operation and size.
"Owned" is with y in a tensor of the caller's own; its peers have it there, too.
At the largest size everything is measured, at the others commlib and the peers that may be best: gloo only
where there is no MPI.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from bench.harness.launch import Launch
from bench.harness.layer_job import LayerJob
from bench.harness.machine import machine, where
from bench.harness.report import Titled, show, table
from bench.harness.samples import RESULTS, options, write_samples
from bench.harness.stats import Stats
from bench.harness.turns import Samples, measure_throughput
from bench.harness.workload import Job, Shape, require_equal_blocks
from bench.systems.commlib import LIMIT, OWNED, ZERO_COPY
from bench.systems.cpus import (
    LAYER,
    ORDER,
    PATHS,
    PEERS,
    PEERS_OF_OWNED,
    PLAIN,
    WINDOWS_OWNED,
    open_systems,
    skipped,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = (1, 8, 64, 1024)  # tokens of a rank
OPERATIONS = ("dispatch", "combine")
FEW, MANY = 7, 24  # iterations: of a size that takes its time, and of a small one
SMALL = 256  # tokens of a rank, at most

Measured = dict[str, Any]  # "path", "tokens", "rows_received" by rank, "samples_s"


@dataclass(frozen=True)
class Versus:
    """A system beside its best peer in one operation: medians, in seconds."""

    ours: float
    best: float
    peer: str

    @property
    def ratio(self) -> float:
        """How many times as fast as the best peer."""
        return self.best / self.ours

    @staticmethod
    def of(samples: Samples, system: str, operation: str) -> Versus | None:
        """None: the system, or every peer, is missing."""
        medians = {name: statistics.median(times[operation]) for name, times in samples.items()}
        known = PEERS_OF_OWNED if system in (OWNED, WINDOWS_OWNED) else PEERS
        peers = [name for name in known if name in medians]
        if system not in medians or not peers:
            return None
        peer = min(peers, key=medians.__getitem__)
        return Versus(medians[system], medians[peer], peer)


# -- measuring -----------------------------------------------------------------------------------------------


def iterations(tokens: int) -> int:
    return MANY if tokens <= SMALL else FEW


def measure(launch: Launch, shape: Shape, args: argparse.Namespace) -> Iterator[tuple[Measured, list[str]]]:
    """Each size on each path, and what was wrong on any rank. Called by all ranks."""
    for tokens in args.tokens:
        sized = replace(shape, tokens=tokens)
        job = Job.build(sized, launch.rank, launch.size)
        rows = launch.gather(len(job.expected.rows))
        for path in PATHS:
            if path == LAYER:
                job = LayerJob.of(job, sized, launch.rank, launch.size)
            everything = tokens == max(args.tokens)
            iters = args.iters or iterations(tokens)
            title = f"{path} path, T={tokens}"
            with open_systems(
                launch, sized, path, args.only, num_sms=args.num_sms, everything=everything
            ) as systems:
                samples, wrong = measure_throughput(launch, job, systems, iters, args.warmup, title)
            measured = {"path": path, "tokens": tokens, "rows_received": rows, "samples_s": samples}
            yield measured, [f"{title}: {text}" for text in chain(*launch.gather(wrong))]


# -- tables --------------------------------------------------------------------------------------------------


def shape_text(args: argparse.Namespace) -> str:
    return f"H={args.hidden} {args.dtype}, top-{args.topk} of {args.experts} experts"


def summary_table(args: argparse.Namespace, found: dict[str, Any]) -> Titled:
    """A line for each path and size: commlib's medians, zero-copy, beside the best peer's."""
    title = f"{where(found['machine'])}, {shape_text(args)}: medians, ms, and those of the best peer"
    columns = ["path", "T", *chain(*((name, "best peer", "ratio") for name in OPERATIONS))]
    sections = [
        [
            [path, str(measured["tokens"]), *chain(*(_versus_cells(measured, o) for o in OPERATIONS))]
            for measured in found["measured"]
            if measured["path"] == path
        ]
        for path in PATHS
    ]
    return title, columns, sections


def ratios(found: dict[str, Any], path: str, ours: str, operation: str) -> list[str]:
    """How many times as fast as the best peer, by size."""
    on_path = [measured["samples_s"] for measured in found["measured"] if measured["path"] == path]
    versus = [Versus.of(samples, ours, operation) for samples in on_path]
    return [f"{v.ratio:.1f}x" if v else "" for v in versus]


def _versus_cells(measured: Measured, operation: str) -> list[str]:
    versus = Versus.of(measured["samples_s"], ZERO_COPY, operation)
    if versus is None:
        return ["", "", ""]
    return [f"{versus.ours * 1e3:.2f}", f"{versus.best * 1e3:.2f} {versus.peer}", f"{versus.ratio:.1f}x"]


def detail_table(args: argparse.Namespace, found: dict[str, Any], measured: Measured) -> Titled:
    """Dispatch and combine on one path at one size, by system."""
    samples = measured["samples_s"]
    iters = len(next(iter(samples.values()))[OPERATIONS[0]]) if samples else 0
    title = f"{measured['path']} path, T={measured['tokens']} {shape_text(args)}, median of {iters}"
    row_bytes = args.hidden * DTYPES[args.dtype].itemsize
    moved = statistics.mean(measured["rows_received"]) * row_bytes
    sections = [list(_detail_rows(o, samples, moved, found["skipped"])) for o in OPERATIONS]
    return title, ("", "system", "ms (min-max)", "GB/s/rank", "x plain", "x best peer", "of limit"), sections


def _detail_rows(
    operation: str, samples: Samples, moved: float, skipped: dict[str, str]
) -> Iterator[list[str]]:
    stats = {name: Stats.of(times[operation]) for name, times in samples.items()}
    for name in ORDER:
        if name in stats:
            median, versus = stats[name].median, Versus.of(samples, name, operation)
            yield [
                operation,
                name,
                stats[name].text(unit=1e-3, digits=1),
                f"{moved / median / 1e9:.2f}",
                f"{stats[PLAIN].median / median:.1f}x" if PLAIN in stats else "",
                f"{versus.ratio:.1f}x" if versus else "",
                f"{stats[LIMIT].median / median:.0%}" if LIMIT in stats else "",
            ]
        elif name in skipped:
            yield [operation, name, skipped[name]]


def tables(args: argparse.Namespace, found: dict[str, Any]) -> list[Titled]:
    """The summary, then the largest size in detail."""
    largest = max(measured["tokens"] for measured in found["measured"])
    detailed = [measured for measured in found["measured"] if measured["tokens"] == largest]
    return [summary_table(args, found), *(detail_table(args, found, measured) for measured in detailed)]


# -- the program ---------------------------------------------------------------------------------------------


def main(shape: Shape, args: argparse.Namespace) -> None:
    with Launch.session() as launch:
        require_equal_blocks(shape.experts, launch.size)
        launch.share_cores()
        missing = skipped(launch, args.only)
        results = list(measure(launch, shape, args))
        if launch.rank == 0:
            facts = {"config": options(args), "machine": machine(launch), "skipped": missing}
            found = facts | {"measured": [measured for measured, _ in results]}
            show(*(table(*each) for each in tables(args, found)))
            path = args.json or RESULTS / f"dispatch_combine-cpu-r{launch.size}.json"
            write_samples(path, found)
            show(f"every sample: {path}")
        wrong = [text for _, texts in results for text in texts]
        if wrong:
            sys.exit("\n".join(["WRONG RESULTS", *wrong]) if launch.rank == 0 else 1)
