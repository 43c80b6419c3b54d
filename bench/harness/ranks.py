"""The ranks that a benchmark runs on, whatever their device: their number, what they share, and one clock.

On the CPU ranks are processes (:class:`Launch`); on a GPU they are threads that share it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import commlib
from bench.harness.launch import Launch
from bench.harness.machine import gpu, host, machine
from bench.harness.orders import changing_orders
from bench.harness.report import progress
from commlib import cuda
from commlib.cli.measuring import DeviceClock, let_ranks_share_a_gpu, usable_cores
from commlib.startup.group import resolve_group

let_ranks_share_a_gpu()  # before anything asks CUDA


class Ranks(ABC):
    """One of the ranks. All ranks make the same calls."""

    rank: int
    size: int
    device: str
    group: Any = None  # for ExpertParallel
    cores: int | None = None  # of a rank; None: it is on a GPU

    @abstractmethod
    def timed(self, operation: Callable[[], Any]) -> float:
        """Seconds from the first rank's begin to the last one's end; the same on all ranks."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank; tensors in it are complete."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Facts that the figures depend on besides the configuration."""

    @abstractmethod
    def partition(self, num_sms: int) -> commlib.SMPartition | None:
        """A partition that all ranks here share, ``num_sms`` for each to communicate; None: impossible."""

    @abstractmethod
    def fitting(self, num_sms: Sequence[int]) -> list[int]:
        """The numbers of communication SMs of a rank for which the device has enough for all ranks."""

    def fastest(self, case: Case, iters: int = 7) -> float:
        """Seconds that a case takes where nothing disturbs it."""
        return min(case.timed(self) for _ in range(iters))


@dataclass(frozen=True)
class Case:
    """Something that is timed, and the context that it runs in."""

    operation: Callable[[], Any]
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext

    def timed(self, ranks: Ranks) -> float:
        with self.inside():
            return ranks.timed(self.operation)


class HostRanks(Ranks):
    """Processes on a host's cores."""

    device = "cpu"

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self.rank, self.size, self.group = launch.rank, launch.size, launch.ranks
        self._facts = machine(launch)
        self.cores = max(1, usable_cores() // self.size)
        self._take_cores()

    def _take_cores(self) -> None:
        """Take cores of its own, where each rank can have some: the kernel may leave two ranks on one."""
        if self.size == 1 or usable_cores() < self.size:
            return
        assert self.cores is not None
        mine = sorted(os.sched_getaffinity(0))[self.rank * self.cores :][: self.cores]
        for thread in map(int, os.listdir("/proc/self/task")):
            os.sched_setaffinity(thread, mine)

    def timed(self, operation: Callable[[], Any]) -> float:
        return self._launch.spans([self._launch.fenced(operation)[0]])[0]

    def gather(self, value: Any) -> list[Any]:
        return self._launch.gather(value)

    def facts(self) -> dict[str, Any]:
        return self._facts

    def partition(self, num_sms: int) -> commlib.SMPartition | None:
        """Processes do not share one: each would take the same cores."""
        if self.size > 1 or num_sms >= usable_cores():
            return None
        return commlib.SMPartition(comm=num_sms, device="cpu")

    def fitting(self, num_sms: Sequence[int]) -> list[int]:
        """Threads may outnumber cores."""
        return list(num_sms)


class DeviceRanks(Ranks):
    """Threads that share a GPU."""

    def __init__(self, device: str) -> None:
        self._group = resolve_group()
        self._clock = DeviceClock(self._group)
        self.rank, self.size, self.device = self._group.rank, self._group.size, device

    def timed(self, operation: Callable[[], Any]) -> float:
        return self._clock.timed(operation)[0]

    def gather(self, value: Any) -> list[Any]:
        torch.cuda.current_stream().synchronize()
        return self._group.allgather(value)

    def facts(self) -> dict[str, Any]:
        return host() | gpu() | {"ranks": self.size}

    def partition(self, num_sms: int) -> commlib.SMPartition | None:
        shared = None
        if self.rank == 0:
            try:
                shared = commlib.SMPartition(comm=num_sms * self.size, device=self.device)
            except (ValueError, RuntimeError) as error:  # too few SMs; a driver without green contexts
                print(f"no partition of {num_sms} SMs for each of {self.size} ranks: {error}")
        return self.gather(shared)[0]

    def fitting(self, num_sms: Sequence[int]) -> list[int]:
        return [n for n in num_sms if n * self.size <= cuda.properties(self.device).sms]


def on_ranks(device: str, size: int, fn: Callable[[Ranks], Any]) -> Any:
    """Call ``fn`` on every rank: of this launch on the CPU, on ``size`` threads on a GPU.

    Returns:
        Rank 0's result (CPU: in its process, None in the others).
    """
    if device == "cpu":
        with Launch.session() as launch:
            launch.share_cores()
            result = fn(HostRanks(launch))
            return result if launch.rank == 0 else None

    def rank_main(rank: int) -> Any:
        with torch.no_grad():
            return fn(DeviceRanks(device))

    return commlib.run_ranks(rank_main, size, device=device, run_ahead=True)[0]


def interleaved(ranks: Ranks, cases: Mapping[str, Case], iters: int, title: str) -> dict[str, list[float]]:
    """Seconds of each case, in changing order."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    with progress(ranks.rank, title, iters * len(cases)) as bar:
        for order in changing_orders(list(cases), iters):
            for name in order:
                samples[name].append(cases[name].timed(ranks))
                bar.update()
    return samples
