"""The CPU: communication on a pool of threads, results in ordinary memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from commlib import _core
from commlib.devices.base import Backend, Facts, Gather, Partition, Platform, Span, Wish
from commlib.event import Event

_POOLED_BYTES = 1 << 20  # results of at least this size come from the communicator's own pool of buffers
# Slots cost address space until they are written: of all ranks' heaps together not more than this, of the
# 128 TiB that a process has.
_SLOTS, _FEWEST_SLOTS, _ADDRESSES = 128, 8, 2**41
# A rank's share of memory. ASSUMED; beside a link that is emulated only, for which way rows take.
_MEMORY_GBPS = 5.0
# With a core for each thread, a peer answers within microseconds. With more threads than cores it may need
# the very core that a spinning thread holds: yield soon, then sleep. See docs/decisions/protocol.md.
_SPIN_OWN_CORE = _core.SpinPolicy(pauses=4000, yields=50)
_SPIN_SHARED_CORE = _core.SpinPolicy(pauses=50, yields=5)


class CpuEvent(Event):
    """On the CPU's pool of communication threads."""

    def __init__(self, core: _core.Communicator, ticket: _core.Ticket) -> None:
        self._core = core
        self._ticket = ticket

    def query(self) -> bool:
        return self._ticket.done

    def wait(self) -> None:
        self._core.wait(self._ticket)

    def _wait_wave(self, waves: _core.PendingDispatch, expert: int) -> None:
        self._core.wait_expert(waves, self._ticket, expert, 0)

    def synchronize(self) -> None:
        self.wait()


class _Done(Event):
    """Of an operation that was done when its call returned."""

    def query(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def _wait_wave(self, waves: _core.PendingDispatch, expert: int) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CpuBackend(Backend):
    """Threads on the host: an operation that is not asynchronous is done when its call returns."""

    core: _core.CpuCommunicator
    converts_between_nodes = True
    ordered = False

    def __init__(self, core: _core.CpuCommunicator) -> None:
        super().__init__(torch.device("cpu"))
        self.core = core

    def tensor(self, memory: _core.Memory) -> Tensor:
        return torch.from_dlpack(memory.__dlpack__())  # no stream to ask for, so this is quicker

    def new_rows(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        if rows * hidden * dtype.itemsize < _POOLED_BYTES:
            return torch.empty(rows, hidden, dtype=dtype, device=self.device)
        return self.tensor(self.core.new_rows(rows))

    @property
    def idle_bytes(self) -> int:
        return self.core.idle_bytes

    def begin_plan(self, awaited: bool) -> None:
        pass

    def begin(self) -> None:
        pass

    def end(
        self, name: str, ticket: _core.Ticket | None, keep: tuple[Any, ...], async_op: bool
    ) -> Event | None:
        if ticket is None:
            return None
        for trace in self.traces:
            trace.notes.append((name, _span_of(trace.zero, ticket)))
        return CpuEvent(self.core, ticket) if async_op else None

    def done(self) -> Event:
        return _Done()

    def mark(self) -> float:
        return time.monotonic()

    def span(self, zero: float, begun: float, ended: float) -> Span:
        return lambda: (begun - zero, ended - zero)


def _span_of(zero: float, ticket: _core.Ticket) -> Span:
    return lambda: (ticket.begun - zero, ticket.ended - zero)


class CpuPartition(Partition):
    """Sets of cores, by the affinities of threads."""

    unit = "cores"

    def __init__(self, comm: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if not 1 <= comm < len(cores):
            raise ValueError(f"comm must lie in [1, {len(cores)}) with {len(cores)} cores, got {comm}")
        self.comm, self.compute = comm, len(cores) - comm
        self.compute_cores, self.comm_cores = cores[:-comm], cores[-comm:]
        self._lock = threading.Lock()  # guards what follows
        self._inside = 0
        self._threads_before = 0

    def claim(self, config: _core.Config) -> None:
        config.cores = self.comm_cores

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._threads_before = torch.get_num_threads()
                torch.set_num_threads(min(self._threads_before, self.compute))
        _move_threads(self.compute_cores, but_not_on=self.comm_cores)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            torch.set_num_threads(self._threads_before)
        _move_threads(sorted([*self.compute_cores, *self.comm_cores]), but_not_on=self.comm_cores)


def _move_threads(cores: list[int], but_not_on: list[int]) -> None:
    """Move all threads of this process to ``cores``, except those that are bound to ``but_not_on``."""
    for thread in map(int, os.listdir("/proc/self/task")):
        try:
            if os.sched_getaffinity(thread) != set(but_not_on):
                os.sched_setaffinity(thread, cores)
        except ProcessLookupError:  # it has ended meanwhile
            continue


class Cpu(Platform):
    """This host's cores."""

    name = "cpu"
    exchanges_fds = False

    def require(self) -> None:
        pass

    def resolve(self, device: torch.device) -> torch.device:
        return torch.device("cpu")  # any index means the same

    def modules(self) -> list[ModuleType]:
        return [_core]

    def default_slots(self, heaps: int) -> int:
        return max(_FEWEST_SLOTS, min(_SLOTS, _ADDRESSES // heaps))

    def default_grouped_rows(self, most: int, expected: int) -> int:
        return most  # memory is taken as it is first written

    def rates(self, facts: Facts, alone: bool) -> tuple[float, float | None] | None:
        return _MEMORY_GBPS, None

    def facts(self, device: torch.device) -> Facts:
        return {"cpus": sorted(os.sched_getaffinity(0)), "place": "memory"}

    def configure(self, config: _core.Config, wish: Wish, infos: list[Facts], gather: Gather) -> None:
        beside = [rank for rank, info in enumerate(infos) if info["host"] == infos[config.rank]["host"]]
        cores = len(set().union(*(infos[rank]["cpus"] for rank in beside)))
        share = cores // (2 * len(beside)) if wish.partition is None else wish.partition.comm // len(beside)
        config.num_sms = wish.num_sms or max(1, share)
        everyones = gather("threads", config.num_sms)
        oversubscribed = sum(everyones[rank] for rank in beside) > cores
        config.spin = _SPIN_SHARED_CORE if oversubscribed else _SPIN_OWN_CORE
        if wish.partition is not None:
            wish.partition.claim(config)

    def connectable(self, config: _core.Config, near: list[Facts]) -> _core.CpuCommunicator:
        return _core.CpuCommunicator(config)

    def backend(self, core: _core.Communicator, config: _core.Config, wish: Wish, facts: Facts) -> Backend:
        assert isinstance(core, _core.CpuCommunicator)
        return CpuBackend(core)

    def partition(self, device: torch.device, comm: int) -> CpuPartition:
        return CpuPartition(comm)

    def rank_thread(self, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
        return nullcontext

    def readable(self, tensor: Tensor) -> bool:
        return True
