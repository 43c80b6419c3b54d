"""The measurement: commlib with several numbers of SMs and plain PyTorch, in turns, on in-process ranks.

Finished measurements stay when time runs out: a step begins only if one as long as the last would still fit.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from tqdm import tqdm

import commlib
from bench.harness.kernels import KernelProfile, KernelSeries, Key
from bench.harness.orders import changing_orders
from bench.harness.report import progress
from bench.harness.turns import System
from bench.harness.workload import Job, Shape, WrongResults
from bench.systems.one_gpu import iterate, make_baselines, open_commlib
from commlib.cli.measuring import DeviceClock, timing_event
from commlib.startup.group import resolve_group

GROUPED_SMS = 8  # rows by expert are measured with this many SMs a rank only


@dataclass(frozen=True)
class Series:
    """Seconds of one operation of one system, iteration by iteration."""

    ranks: int
    system: str
    num_sms: int | None  # None: plain PyTorch, which takes as many as it gets
    operation: str
    seconds: list[float]


@dataclass(frozen=True)
class Plan:
    """The measurements with one number of ranks."""

    shape: Shape
    ranks: int
    num_sms: Sequence[int]  # of a rank, one after the other
    iters: int
    warmup: int
    copy_bytes: int
    device: str = "cuda"
    profile_iters: int = 0  # with each number of SMs, while kernels are watched
    deadline: float | None = None  # of the monotonic clock: no step begins that would end later


class CopyMeter:
    """Measures how fast the GPU copies its own memory: the limit for ranks that share it."""

    def __init__(self, num_bytes: int, device: str) -> None:
        self._source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        for _ in range(3):
            self.bandwidth()

    def bandwidth(self) -> float:
        """Bytes read and written per second, of one copy while nothing else runs."""
        begin, end = timing_event(), timing_event()
        begin.record()
        self._target.copy_(self._source)
        end.record()
        end.synchronize()
        return 2 * self._source.numel() / (begin.elapsed_time(end) * 1e-3)


@dataclass
class Record:
    """One rank's findings so far. Times are the same on all ranks."""

    seconds: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    copies: list[float] = field(default_factory=list)  # bytes per second of each plain copy; on rank 0
    rows: float = 0.0  # received by a rank, on average
    kernels: list[KernelSeries] = field(default_factory=list)  # on rank 0
    no_kernels: str = "not asked for"  # why there are none
    left_out: list[str] = field(default_factory=list)  # steps that did not fit before the deadline

    @property
    def measured(self) -> list[int]:
        """The numbers of SMs."""
        return sorted({num_sms for _, num_sms, _ in self.seconds if num_sms is not None})

    def series(self, ranks: int) -> list[Series]:
        return [Series(ranks, *key, seconds) for key, seconds in self.seconds.items()]


def measure(plan: Plan) -> Record:
    """Run the plan.

    Raises:
        WrongResults: naming system, rank and what was wrong.
    """
    return _on_ranks(plan, lambda record: _Timer(plan, record).run())


def watch(plan: Plan, record: Record) -> Record:
    """The record with kernel times of what was measured, or why there are none.

    It is a run of its own, after all times have been written: the profiler slows down whatever this process
    does later, and where it fails nothing is lost.
    """
    found = _on_ranks(plan, lambda seen: _Watcher(plan, seen).run(record.measured))
    left_out = [*record.left_out, *found.left_out]
    return replace(record, kernels=found.kernels, no_kernels=found.no_kernels, left_out=left_out)


def _on_ranks(plan: Plan, run: Callable[[Record], None]) -> Record:
    """Rank 0's record."""

    def rank_main(rank: int) -> Record:
        record = Record()
        with torch.no_grad():
            run(record)
        return record

    try:
        return commlib.run_ranks(rank_main, plan.ranks, device=plan.device, run_ahead=True)[0]
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # the next ranks have other streams, which could not use its memory


class _Rank:
    """One rank's part. All ranks make the same calls."""

    def __init__(self, plan: Plan, record: Record) -> None:
        self._plan, self._group, self._record = plan, resolve_group(), record
        self._job = Job.build(plan.shape, self._group.rank, self._group.size, plan.device)
        self._clock = DeviceClock(self._group)

    def _while_time_is_left(self, step: str, run: Callable[[int], None], choices: Sequence[int]) -> None:
        """One step for each number of SMs. Those for which no time is left are noted as left out."""
        longest = 0.0
        for done, num_sms in enumerate(choices):
            begin = time.monotonic()
            late = self._plan.deadline is not None and begin + longest > self._plan.deadline
            if self._group.allgather(late)[0]:
                self._record.left_out += [step.format(n) for n in choices[done:]]
                return
            run(num_sms)
            self._drop()
            longest = max(longest, time.monotonic() - begin)

    def _drop(self) -> None:
        """Free a closed communicator's memory on every rank before any rank makes the next one.

        Two heaps of 8 ranks at once fill most of an 80 GB GPU.
        """
        self._group.barrier()  # one rank collects for all: they share a process, and its garbage
        if self._group.rank == 0:
            gc.collect()
            torch.cuda.empty_cache()
        self._group.barrier()

    def _timed(self, operation: str, run: Callable[[], Any]) -> tuple[float, Any]:
        return self._clock.timed(run)


class _Timer(_Rank):
    """A rank's part in the measurement."""

    def __init__(self, plan: Plan, record: Record) -> None:
        super().__init__(plan, record)
        self._baselines = make_baselines(self._group, plan.shape, plan.device)
        self._copy = CopyMeter(plan.copy_bytes, plan.device) if self._group.rank == 0 else None

    def run(self) -> None:
        plan = self._plan
        grouped_sms = GROUPED_SMS if GROUPED_SMS in plan.num_sms else plan.num_sms[0]
        total = len(plan.num_sms) * (plan.warmup + plan.iters)
        with progress(self._group.rank, f"{plan.ranks} ranks", total) as bar:
            self._while_time_is_left(
                "{} SMs a rank",
                lambda num_sms: self._measure(num_sms, self._job if num_sms == grouped_sms else None, bar),
                plan.num_sms,
            )
        self._record.rows = statistics.mean(self._group.allgather(len(self._job.expected.rows)))

    def _measure(self, num_sms: int, grouped_for: Job | None, bar: tqdm) -> None:
        """Measure one number of SMs. Whatever holds this communicator's memory ends with this call."""
        plan = self._plan
        with open_commlib(plan.shape, num_sms, grouped_for) as ours:
            systems = [*ours, *self._baselines]
            self._check(systems, num_sms)
            for i, order in enumerate(changing_orders(systems, plan.warmup + plan.iters)):
                self._take_turns(order, num_sms, keep=i >= plan.warmup)
                bar.update()

    def _check(self, systems: list[System], num_sms: int) -> None:
        wrong: list[str] = []
        for system in systems:
            _, texts = iterate(system, self._job, self._timed, check=True)
            wrong += [f"rank {self._group.rank}, {num_sms} SMs, {text}" for text in texts]
        wrong = list(chain(*self._group.allgather(wrong)))
        if wrong:
            raise WrongResults("\n".join(wrong))

    def _take_turns(self, systems: list[System], num_sms: int, keep: bool) -> None:
        """One iteration of each."""
        if self._copy is not None:  # the others wait at the clock's barrier
            self._record.copies.append(self._copy.bandwidth())
        for system in systems:
            seconds, _ = iterate(system, self._job, self._timed, check=False)
            budget = None if system in self._baselines else num_sms
            for operation, taken in seconds.items() if keep else ():
                self._record.seconds[system.name, budget, operation].append(taken)


class _Watcher(_Rank):
    """A rank's part in watching commlib's kernels."""

    def run(self, choices: Sequence[int]) -> None:
        """Run once more with each of these numbers of SMs."""
        profile = KernelProfile() if self._group.rank == 0 else None
        with profile.running() if profile else nullcontext():
            self._group.barrier()  # it runs on rank 0, and sees the kernels of all
            self._while_time_is_left(
                "kernel times, {} SMs a rank", lambda num_sms: self._watch(num_sms, profile), choices
            )
        if profile is not None:
            self._record.kernels = profile.series(self._plan.ranks)
            self._record.no_kernels = profile.why_not

    def _watch(self, num_sms: int, profile: KernelProfile | None) -> None:
        with open_commlib(self._plan.shape, num_sms, None) as ours:
            for i in range(-1, self._plan.profile_iters):
                for system in ours:

                    def watched(operation: str, run: Callable[[], Any], name: str = system.name) -> Any:
                        torch.cuda.current_stream().synchronize()
                        self._group.barrier()  # other ranks' earlier work has run, and is not in the window
                        with profile.window((name, num_sms, operation)) if profile else nullcontext():
                            return self._timed(operation, run)

                    iterate(system, self._job, self._timed if i < 0 else watched, check=False)
