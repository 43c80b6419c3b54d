"""Time on a GPU that in-process ranks share: one operation of all ranks, and a plain copy to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from commlib import Group

# Within it every rank has queued all that it can before it must wait for the GPU. Ranks in one process take
# turns under one GIL, and a fresh dispatch is 100 to 150 µs of Python on each side of its wait for counts: 8
# ranks need about 2 ms where nothing disturbs them. A gate that opens before the last rank has queued shows
# the interpreter, not the GPU; one that opens late costs only its own time.
GATE_SECONDS = 8e-3
_CALIBRATION_CYCLES = 10_000_000


class DeviceClock:
    """Times operations that all ranks begin together, each on its own stream of one GPU.

    Every rank queues its operation behind a gate, a kernel that takes GATE_SECONDS, so that all begin at
    one moment although Python makes one call after another. Times are those of CUDA events, counted from
    the gate's end: from the first rank's begin to the last rank's end. They include what an operation
    does on the host while it runs, such as reading counts.
    """

    def __init__(self, group: Group) -> None:
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
        begin, end = _timing_event(), _timing_event()
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
            opens = _timing_event()
            opens.record(self._gate_stream)
        return opens


class CopyMeter:
    """Measures how fast the GPU copies its own memory: the limit for ranks that share it."""

    def __init__(self, num_bytes: int, device: str) -> None:
        self._source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        for _ in range(3):
            self.bandwidth()

    def bandwidth(self) -> float:
        """Bytes read and written per second, of one copy while nothing else runs."""
        begin, end = _timing_event(), _timing_event()
        begin.record()
        self._target.copy_(self._source)
        end.record()
        end.synchronize()
        return 2 * self._source.numel() / (begin.elapsed_time(end) * 1e-3)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _cycles_in(seconds: float) -> int:
    """The cycles that `torch.cuda._sleep` takes for that time. The second try: by then clocks have risen."""
    for _ in range(2):
        begin, end = _timing_event(), _timing_event()
        begin.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        end.record()
        end.synchronize()
        taken = begin.elapsed_time(end) * 1e-3
    return int(_CALIBRATION_CYCLES * seconds / taken)
