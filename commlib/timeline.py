"""When communication and compute ran: a trace of one rank, as a picture or for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commlib.devices.base import Span, Trace
from commlib.expert_parallel import ExpertParallel

COMPUTE, COMMUNICATION = "compute", "communication"


@dataclass(frozen=True)
class Interval:
    """Something that ran: on which lane, what, and from when to when in seconds after the trace began."""

    lane: str
    name: str
    begin: float
    end: float


def _covered(intervals: Iterable[Interval]) -> float:
    """Seconds that lie in any of the intervals, which are sorted by their begin."""
    total = until = 0.0
    for i in intervals:
        total += max(0.0, i.end - max(i.begin, until))
        until = max(until, i.end)
    return total


class Timeline:
    """Notes every operation of a communicator, and what is computed inside :meth:`compute`.

    ::

        with Timeline(ep) as timeline:
            with timeline.compute("attention"):
                ...
        timeline.save_perfetto("trace.json")

    CPU: the times are those of the communication threads and of the calling thread. CUDA: of the streams.

    Args:
        ep: the communicator.
    """

    def __init__(self, ep: ExpertParallel) -> None:
        self._ep = ep
        self._notes: list[tuple[str, str, Span]] = []
        self.intervals: list[Interval] = []

    def __enter__(self) -> Timeline:
        backend = self._ep._comm.backend
        self._trace = Trace(backend.mark())
        backend.traces = (*backend.traces, self._trace)
        return self

    def __exit__(self, *error: Any) -> None:
        backend = self._ep._comm.backend  # perhaps another one, with a larger heap
        backend.traces = tuple(trace for trace in backend.traces if trace is not self._trace)
        if error[0] is not None:
            return
        self._ep.synchronize()
        notes = [*self._notes, *((COMMUNICATION, name, span) for name, span in self._trace.notes)]
        for lane, name, span in notes:
            begin, end = span()
            self.intervals.append(Interval(lane, name, begin, end))
        self.intervals.sort(key=lambda i: i.begin)

    @contextmanager
    def compute(self, name: str) -> Iterator[None]:
        """Note what is computed inside."""
        backend = self._ep._comm.backend
        if backend.is_captured():  # each run has its own times
            yield
            return
        begun = backend.mark()
        yield
        self._notes.append((COMPUTE, name, backend.span(self._trace.zero, begun, backend.mark())))

    def busy(self, lane: str) -> float:
        """Seconds in which anything ran on a lane."""
        return _covered(i for i in self.intervals if i.lane == lane)

    def both_busy(self) -> float:
        """Seconds in which communication and compute ran at once."""
        return self.busy(COMPUTE) + self.busy(COMMUNICATION) - _covered(self.intervals)

    def save_perfetto(self, path: str | Path, process: str = "rank") -> None:
        """Write a trace that ui.perfetto.dev and chrome://tracing open."""
        lanes = {lane: n for n, lane in enumerate((COMPUTE, COMMUNICATION))}
        names = [
            {"ph": "M", "pid": 0, "tid": n, "name": "thread_name", "args": {"name": lane}}
            for lane, n in lanes.items()
        ]
        names.append({"ph": "M", "pid": 0, "name": "process_name", "args": {"name": process}})
        events = [
            {
                "ph": "X",
                "pid": 0,
                "tid": lanes[i.lane],
                "name": i.name,
                "ts": i.begin * 1e6,
                "dur": (i.end - i.begin) * 1e6,
            }
            for i in self.intervals
        ]
        Path(path).write_text(json.dumps({"traceEvents": [*names, *events]}))
