"""Clocks, and facts about this machine: for ``commlib bench --calibrate`` and the benchmarks in bench/."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import commlib
from commlib.startup.group import Group, in_process_group

Interval = tuple[float, float]  # begin and end, seconds of the host's monotonic clock

# Within it every rank has queued all that it can before it must wait for the GPU. Ranks in one process take
# turns under one GIL, and a fresh dispatch is 100 to 150 µs of Python on each side of its wait for counts: 8
# ranks need about 2 ms where nothing disturbs them. A gate that opens before the last rank has queued shows
# the interpreter, not the GPU; one that opens late costs only its own time.
GATE_SECONDS = 8e-3
_CALIBRATION_CYCLES = 10_000_000


def let_ranks_share_a_gpu() -> None:
    """Set what ranks that are threads on one GPU need (docs/gpu.md). CUDA reads it when it starts."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def usable_cores() -> int:
    """Cores this process may run on, in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def host_facts() -> dict[str, Any]:
    """Facts about the host and its software that figures depend on."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commlib": commlib.__version__,
    }


def timed(operation: Callable[[], Any]) -> tuple[Interval, Any]:
    """Run an operation; return when it began and ended on this rank, and its result."""
    begin = time.monotonic()
    result = operation()
    return (begin, time.monotonic()), result


class HostClock:
    """Times operations that all ranks begin together, each on its host: with a GPU, until that is done."""

    def __init__(self, group: Group, device: str) -> None:
        self._group, self._on_gpu = group, device == "cuda"

    def timed(self, operation: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that the operation took on this rank, and its result. Called by all ranks."""
        self._wait()
        self._group.barrier()
        (begin, end), result = timed(lambda: self._done(operation))
        return end - begin, result

    def _done(self, operation: Callable[[], Any]) -> Any:
        result = operation()
        self._wait()
        return result

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()


class DeviceClock:
    """Times operations that all ranks begin together, each on its own stream of one GPU.

    Every rank queues its operation behind a gate, a kernel that takes GATE_SECONDS, so that all begin at
    one moment although Python makes one call after another. Times are those of CUDA events, counted from
    the gate's end: from the first rank's begin to the last rank's end. They include what an operation
    does on the host while it runs, such as reading counts.

    Args:
        group: in-process ranks, which gather any object, or one rank.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._gate_stream = torch.cuda.Stream()
        self._gate_cycles = _cycles_in(GATE_SECONDS)

    def timed(self, operation: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that the operation took all ranks, and its result on this one. Called by all ranks."""
        stream = torch.cuda.current_stream()
        stream.synchronize()
        self._group.barrier()
        opens = self._group.allgather(self._close_gate() if self._group.rank == 0 else None)[0]
        stream.wait_event(opens)
        begin, end = timing_event(), timing_event()
        begin.record(stream)
        result = operation()
        end.record(stream)
        end.synchronize()
        intervals = self._group.allgather((opens.elapsed_time(begin), opens.elapsed_time(end)))
        milliseconds = max(end for _, end in intervals) - min(begin for begin, _ in intervals)
        return milliseconds * 1e-3, result

    def _close_gate(self) -> torch.cuda.Event:
        with torch.cuda.stream(self._gate_stream):
            torch.cuda._sleep(self._gate_cycles)
            opens = timing_event()
            opens.record(self._gate_stream)
        return opens


Clock = HostClock | DeviceClock


def clock_for(group: Group, device: str) -> Clock:
    """The clock for ranks on that kind of device: the GPU's own, if they are threads that share it."""
    return (
        DeviceClock(group) if device == "cuda" and in_process_group() is group else HostClock(group, device)
    )


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _cycles_in(seconds: float) -> int:
    """The cycles that `torch.cuda._sleep` takes for that time. The second try: by then clocks have risen."""
    for _ in range(2):
        begin, end = timing_event(), timing_event()
        begin.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        end.record()
        end.synchronize()
        taken = begin.elapsed_time(end) * 1e-3
    return int(_CALIBRATION_CYCLES * seconds / taken)
