"""The measurement: commlib with several numbers of SMs and plain PyTorch, in turns, on in-process ranks."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from common import progress
from gpu_clock import CopyMeter, DeviceClock
from gpu_systems import iterate, make_baselines, open_commlib
from systems import System
from workload import Job, Shape, WrongResults

import commlib
from commlib.group import resolve_group

GROUPED_SMS = 8  # rows by expert are measured with this many SMs a rank only


@dataclass(frozen=True)
class Series:
    """Seconds of one operation of one system, iteration by iteration."""

    ranks: int
    system: str
    num_sms: int | None  # None: plain PyTorch, which takes what it gets
    operation: str
    seconds: list[float]


@dataclass(frozen=True)
class Plan:
    """What is measured with one number of ranks."""

    shape: Shape
    ranks: int
    num_sms: Sequence[int]  # of a rank, one after the other
    iters: int
    warmup: int
    copy_bytes: int
    device: str = "cuda"


@dataclass
class Record:
    """What one rank has seen so far. Times are the same on all ranks."""

    seconds: dict[tuple[str, int | None, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    copies: list[float] = field(default_factory=list)  # bytes per second of each plain copy; on rank 0
    rows: float = 0.0  # that a rank receives, on average

    def series(self, ranks: int) -> list[Series]:
        return [Series(ranks, *key, seconds) for key, seconds in self.seconds.items()]


def measure(plan: Plan) -> Record:
    """Run the plan.

    Raises:
        WrongResults: naming system, rank and what was wrong.
    """

    def rank_main(rank: int) -> Record:
        with torch.no_grad():
            return _Rank(plan).run()

    return commlib.run_ranks(rank_main, plan.ranks, device=plan.device)[0]


class _Rank:
    """One rank's part. All ranks make the same calls."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._group, self._record = plan, resolve_group(), Record()
        self._job = Job.build(plan.shape, self._group.rank, self._group.size, plan.device)
        self._clock = DeviceClock(self._group)
        self._baselines = make_baselines(self._group, plan.shape, plan.device)
        self._copy = CopyMeter(plan.copy_bytes, plan.device) if self._group.rank == 0 else None
        self._turns = random.Random(0)  # the same on all ranks

    def run(self) -> Record:
        plan = self._plan
        grouped_sms = GROUPED_SMS if GROUPED_SMS in plan.num_sms else plan.num_sms[0]
        total = len(plan.num_sms) * (plan.warmup + plan.iters)
        with progress(self._group.rank, f"{plan.ranks} ranks", total) as bar:
            for num_sms in plan.num_sms:
                job = self._job if num_sms == grouped_sms else None
                with open_commlib(plan.shape, num_sms, grouped_for=job) as ours:
                    systems = [*ours, *self._baselines]
                    self._check(systems, num_sms)
                    for i in range(-plan.warmup, plan.iters):
                        self._take_turns(systems, num_sms, keep=i >= 0)
                        bar.update()
        self._record.rows = statistics.mean(self._group.allgather(len(self._job.expected.rows)))
        return self._record

    def _check(self, systems: list[System], num_sms: int) -> None:
        wrong: list[str] = []
        for system in systems:
            _, texts = iterate(system, self._job, self._clock, check=True)
            wrong += [f"rank {self._group.rank}, {num_sms} SMs, {text}" for text in texts]
        wrong = list(chain(*self._group.allgather(wrong)))
        if wrong:
            raise WrongResults("\n".join(wrong))

    def _take_turns(self, systems: list[System], num_sms: int, keep: bool) -> None:
        """One iteration of each, in another order each time: who runs before decides what the cache holds."""
        if self._copy is not None:  # the others wait at the clock's barrier
            self._record.copies.append(self._copy.bandwidth())
        for system in self._turns.sample(systems, len(systems)):
            seconds, _ = iterate(system, self._job, self._clock, check=False)
            budget = None if system in self._baselines else num_sms
            for operation, taken in seconds.items() if keep else ():
                self._record.seconds[system.name, budget, operation].append(taken)
