"""Systems that take turns on one job, iteration by iteration and in changing order."""

from __future__ import annotations

import random

from common import Interval, Launch, progress
from systems import System
from workload import Job

Samples = dict[str, dict[str, list[float]]]  # system -> operation -> seconds, iteration by iteration
Intervals = dict[str, dict[str, list[Interval]]]  # the same on one rank, with begin and end


def measure_throughput(
    launch: Launch, job: Job, systems: list[System], iters: int, warmup: int
) -> tuple[Samples, list[str]]:
    """Seconds of every iteration, and what was wrong in the first and the last one."""
    wrong: list[str] = []
    local: Intervals = {system.name: {"dispatch": [], "combine": []} for system in systems}
    total = warmup + iters
    turns = random.Random(0)  # the same on all ranks
    with progress(launch.rank, "dispatch and combine", total * len(systems)) as bar:
        for i in range(total):
            report = wrong.append if i in (0, total - 1) else None
            # A new order each time: what ran before decides what is in the caches.
            for system in turns.sample(systems, len(systems)):
                dispatched, combined = system.iterate(job, launch, report)
                if i >= warmup:
                    local[system.name]["dispatch"].append(dispatched)
                    local[system.name]["combine"].append(combined)
                bar.update()
    return job_spans(launch, local), wrong


def job_spans(launch: Launch, local: Intervals) -> Samples:
    return {
        system: {operation: launch.spans(intervals) for operation, intervals in operations.items()}
        for system, operations in local.items()
    }
