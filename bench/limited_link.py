"""What a slow link leaves: dispatch and combine where each rank's link is paced to a given rate.

`python bench/dispatch_combine.py --preset h800` (or `--link-gbps`) runs this. Memory of one machine is slower
than a real link, so a preset's rate is divided by `--slow-down`, and everything scales with it. Compared on
the same link:

* commlib: each token once to each rank that owns one of its experts;
* a row for each of a token's experts, as a plain all-to-all sends them, through the same code (each pair of
  token and expert is a token of its own);
* commlib's dispatch beside a matmul of the same length, against one after the other.

Times are held against the link's own: bytes that must cross it, over its rate.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from common import Interval, Launch, Stats, progress
from report import RESULTS, machine, show, table, write_json
from workload import Job, Shape

import commlib


@dataclass(frozen=True)
class Preset:
    """A link's rate in GB/s, one direction, and where it is from."""

    gbps: float
    source: str


PRESETS = {
    "h800": Preset(160, "achievable on NVLink, by DeepEP's docs/legacy.md"),
    "h100": Preset(450, "NVLink 4: 900 GB/s both ways, by NVIDIA's datasheet"),
    "h20": Preset(450, "NVLink 4: 900 GB/s both ways, by NVIDIA's datasheet"),
    "pcie5": Preset(63, "16 lanes of 32 GT/s with 128b/130b coding"),
}
MATMUL = 192  # rows and columns of the matmul beside a dispatch


def add_link_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a limited link."""
    group = parser.add_argument_group("a limited link (instead of the comparison)")
    group.add_argument("--preset", choices=PRESETS, help="a kind of link")
    group.add_argument("--link-gbps", type=float, help="GB/s of each rank's link, instead of a preset")
    group.add_argument("--slow-down", type=float, default=200, help="divides a preset's rate")


class Work:
    """What is timed on the limited link."""

    def __init__(self, launch: Launch, shape: Shape, job: Job, gbps: float, num_sms: int | None) -> None:
        self._stack = ExitStack()
        self.job, k = job, shape.topk
        common = dict(device="cpu", num_sms=num_sms, link_gbps=gbps)
        open_ep = self._stack.enter_context
        self.ep = open_ep(commlib.ExpertParallel(launch.ranks, **shape.sizes, **common))
        each = shape.sizes | {"topk": 1, "max_tokens": shape.tokens * k}
        self.each_ep = open_ep(commlib.ExpertParallel(launch.ranks, **each, **common))
        self.each_x = job.x.repeat_interleave(k, dim=0)
        self.each_idx = job.topk_idx.reshape(-1, 1)
        self.each_weights = job.topk_weights.reshape(-1, 1)
        self.d = self.ep.dispatch(job.x, job.topk_idx, job.topk_weights)
        self.each_d = self.each_ep.dispatch(self.each_x, self.each_idx, self.each_weights)
        self.a, self.b, self.repeats = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL), 1

    def close(self) -> None:
        self.d = self.each_d = None
        self._stack.close()

    def dispatch(self) -> None:
        self.d = self.ep.dispatch(self.job.x, self.job.topk_idx, self.job.topk_weights)

    def combine(self) -> None:
        self.ep.combine(self.d.x, self.d.handle)

    def dispatch_each(self) -> None:
        self.each_d = self.each_ep.dispatch(self.each_x, self.each_idx, self.each_weights)

    def combine_each(self) -> None:
        self.each_ep.combine(self.each_d.x, self.each_d.handle)

    def matmul(self) -> None:
        for _ in range(self.repeats):
            torch.mm(self.a, self.b)

    def both(self) -> None:
        event = self.ep.dispatch(self.job.x, self.job.topk_idx, self.job.topk_weights, async_op=True).event
        self.matmul()
        assert event is not None
        event.wait()

    def rows_on_link(self, launch: Launch) -> dict[str, int]:
        """Rows of the busiest rank that leave it, and of each (token, expert) pair."""
        local = self.job.topk_idx // (self.ep.settings.num_experts // launch.size)
        remote = local[local != launch.rank]
        unique = sum(int((local == r).any(1).sum()) for r in range(launch.size) if r != launch.rank)
        counts = launch.gather((unique, remote.numel()))
        return {"unique": max(c[0] for c in counts), "each": max(c[1] for c in counts)}


def run(launch: Launch, shape: Shape, args: argparse.Namespace) -> None:
    """Measure and publish."""
    gbps = args.link_gbps or PRESETS[args.preset].gbps / args.slow_down
    job = Job.build(shape, launch.rank, launch.size)
    work = Work(launch, shape, job, gbps, args.num_sms)
    try:
        operations = balanced(launch, work)
        samples = measure(launch, operations, args.iters)
        rows = work.rows_on_link(launch)
    finally:
        work.close()
    if launch.rank == 0:
        publish(launch, args, gbps, samples, rows, shape.hidden * shape.dtype.itemsize)


def balanced(launch: Launch, work: Work) -> dict[str, Callable[[], None]]:
    """The operations by name; the matmul takes about as long as the dispatch does."""
    for operation in (work.dispatch, work.combine, work.matmul, work.both):
        operation()

    def median(operation: Callable[[], None]) -> float:
        return statistics.median(launch.spans([launch.fenced(operation)[0] for _ in range(3)]))

    work.repeats = 20
    work.repeats = max(1, round(20 * median(work.dispatch) / median(work.matmul)))
    return {
        "dispatch": work.dispatch,
        "dispatch, a row for each expert": work.dispatch_each,
        "combine": work.combine,
        "combine, a row for each expert": work.combine_each,
        "matmul": work.matmul,
        "dispatch beside matmul": work.both,
    }


def measure(launch: Launch, operations: dict[str, Callable[[], None]], iters: int) -> dict[str, list[float]]:
    """Seconds of each, in changing order."""
    local: dict[str, list[Interval]] = {name: [] for name in operations}
    turns = random.Random(0)  # the same on all ranks
    with progress(launch, "limited link", iters * len(operations)) as bar:
        for _ in range(iters):
            for name in turns.sample(list(operations), len(operations)):
                local[name].append(launch.fenced(operations[name])[0])
                bar.update()
    return {name: launch.spans(intervals) for name, intervals in local.items()}


def publish(
    launch: Launch,
    args: argparse.Namespace,
    gbps: float,
    samples: dict[str, list[float]],
    rows: dict[str, int],
    row_bytes: int,
) -> None:
    facts = machine(launch)
    stats = {name: Stats.of(seconds) for name, seconds in samples.items()}
    lines = []
    for name, s in stats.items():
        if name in ("matmul", "dispatch beside matmul"):
            lines.append([name, s.text(), "", "", ""])
            continue
        moved = rows["each" if "each" in name else "unique"] * row_bytes
        least = moved / (gbps * 1e9)
        lines.append([name, s.text(), f"{moved / 1e6:.1f}", f"{least * 1e3:.1f}", f"{least / s.median:.0%}"])
    link = f"{gbps:g} GB/s"
    if args.preset and not args.link_gbps:
        preset = PRESETS[args.preset]
        link = f"{args.preset}'s {preset.gbps:g} GB/s ({preset.source}) slowed down {args.slow_down:g} times"
    title = (
        f"{launch.size} ranks on {facts['cores']} cores ({facts['cpu']}), a link of {link} each; "
        f"T={args.tokens} H={args.hidden} {args.dtype}, top-{args.topk} of {args.experts}"
    )
    show(table(title, ["", "ms (min-max)", "MB on the link", "ms it needs", "of the link"], [lines]))
    both, alone = stats["dispatch beside matmul"].median, stats["dispatch"].median + stats["matmul"].median
    saved = rows["each"] / rows["unique"]
    show(
        f"once to each rank: {saved:.2f} times fewer bytes; beside a matmul: {alone / both:.2f} times faster"
    )
    path = args.json or RESULTS / f"limited_link-cpu-r{launch.size}.json"
    config: dict[str, Any] = {k: sorted(v) if isinstance(v, set) else v for k, v in vars(args).items()}
    config |= {"json": str(path), "link_gbps": gbps}
    write_json(path, {"config": config, "machine": facts, "rows_on_link": rows, "samples_s": samples})
    show(f"every sample: {path}")
