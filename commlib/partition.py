"""Communication beside compute on disjoint SMs of a GPU, or on disjoint cores of a host."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from commlib import _core, cuda


class SMPartition:
    """A share of the SMs reserved for communication, and the rest for compute.

    Give it to communicators (``ExpertParallel(partition=p)``), and compute inside the context::

        p = commlib.SMPartition(comm=8)
        ep = commlib.ExpertParallel(..., partition=p)
        with p:
            y = layer(x)

    CUDA: green contexts. Inside, the current stream of the calling thread is a stream on the compute SMs
    (what was queued before comes first, and what is queued after the context comes after it); communicators
    use streams on the others. Backward runs on the stream on which forward ran, as always in PyTorch, and
    so inside the same share. Hardware splits SMs in groups: ``asked`` is the number asked for, ``comm`` and
    ``compute`` are the numbers given.

    CPU: sets of cores. Inside, all threads of the process except communicators' run on the compute cores,
    and PyTorch uses one thread for each of these; asynchronous operations run on the others.

    It can be entered again after it was left, and by several threads (in-process ranks) at once.

    Args:
        comm: SMs (cores) for communication.
        device: "cpu", "cuda" or "cuda:i". None: the current CUDA device if there is one, else "cpu".

    Raises:
        ValueError: ``comm`` leaves nothing for compute, or is less than 1.
        RuntimeError: there is no such GPU, or its driver has no green contexts.
    """

    def __init__(self, comm: int, device: Any = None) -> None:
        if device is None:
            device = "cuda" if cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.asked = comm
        self._entered = threading.local()
        self._lock = threading.Lock()  # guards _inside and _before
        self._inside = 0
        if self.device.type == "cuda":
            cuda.require()
            self.device = torch.device("cuda", cuda.device_index(device))
            self._part = cuda._cuda.Partition(cuda.device_index(device), comm)
            self.comm, self.compute = self._part.comm_sms, self._part.compute_sms
            self.comm_cores: list[int] = []
            self.compute_cores: list[int] = []
            return
        cores = sorted(os.sched_getaffinity(0))
        if not 1 <= comm < len(cores):
            raise ValueError(f"comm must lie in [1, {len(cores)}) with {len(cores)} cores, got {comm}")
        self.comm, self.compute = comm, len(cores) - comm
        self.compute_cores, self.comm_cores = cores[:-comm], cores[-comm:]

    @property
    def compute_stream(self) -> torch.cuda.Stream:
        """The calling thread's stream on the compute SMs (CUDA only)."""
        if getattr(self._entered, "stream", None) is None:
            self._entered.owner = self._part.compute_stream()  # this thread's alone, as long as it lives
            self._entered.stream = torch.cuda.ExternalStream(self._entered.owner.handle, self.device)
        return self._entered.stream

    def give_streams(self, config: _core.Config) -> None:
        """Let a communicator work on the communication SMs (CUDA only), in streams of its own."""
        cuda._cuda.give_streams(config, self._part)

    def check_fits(self, device: torch.device, num_sms: int | None) -> None:
        """Raise ValueError unless a communicator on ``device`` with ``num_sms`` can use this partition."""
        if device != self.device:
            raise ValueError(f"the partition is of {self.device}, the communicator on {device}")
        if num_sms is not None and num_sms > self.comm:
            raise ValueError(f"num_sms is {num_sms}, but the partition has {self.comm} for communication")

    def __enter__(self) -> SMPartition:
        if self.device.type == "cuda":
            before = torch.cuda.current_stream(self.device)
            self._entered.before = [*getattr(self._entered, "before", []), before]
            self.compute_stream.wait_stream(before)
            torch.cuda.set_stream(self.compute_stream)
            return self
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._threads_before = torch.get_num_threads()
                torch.set_num_threads(min(self._threads_before, self.compute))
        _move_threads(self.compute_cores, but_not_on=self.comm_cores)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            before = self._entered.before.pop()
            before.wait_stream(self.compute_stream)
            torch.cuda.set_stream(before)
            return
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            torch.set_num_threads(self._threads_before)
        _move_threads(sorted([*self.compute_cores, *self.comm_cores]), but_not_on=self.comm_cores)

    def __repr__(self) -> str:
        kind = "SMs" if self.device.type == "cuda" else "cores"
        return (
            f"SMPartition({self.device}: {self.comm} {kind} for communication ({self.asked} asked), "
            f"{self.compute} for compute)"
        )


def _move_threads(cores: list[int], but_not_on: list[int]) -> None:
    """Move all threads of this process to ``cores``, except those that are bound to ``but_not_on``."""
    for thread in map(int, os.listdir("/proc/self/task")):
        try:
            if os.sched_getaffinity(thread) != set(but_not_on):
                os.sched_setaffinity(thread, cores)
        except ProcessLookupError:  # it has ended meanwhile
            continue
