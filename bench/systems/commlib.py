"""commlib as it is compared: zero-copy, with tensors that the caller owns, and what the machine allows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.harness.launch import Launch
from bench.harness.turns import Report, System
from bench.harness.workload import Job, Received
from commlib.bench_support import BareMover
from commlib.cli.measuring import Interval

ZERO_COPY, OWNED, LIMIT = "commlib zero-copy", "commlib owned", "bare limit"


class Commlib(System):
    """commlib through its Python API, with tensors the caller owns."""

    name = OWNED
    zero_copy = False

    def __init__(self, ep: Any) -> None:
        self._ep = ep
        self._handle: Any = None

    def dispatch(self, job: Job) -> Received:
        d = self._ep.dispatch(job.x, job.topk_idx, job.topk_weights, zero_copy=self.zero_copy)
        self._handle = d.handle
        return Received(d.x, d.topk_idx, d.topk_weights)

    def redispatch(self, job: Job) -> Tensor:
        """Timed: the rows again, with the previous dispatch's routing."""
        again = self._ep.dispatch(
            job.x, topk_weights=job.topk_weights, handle=self._handle, zero_copy=self.zero_copy
        )
        return again.x

    def combine(self, y: Tensor) -> Tensor:
        return self._ep.combine(y, self._handle)

    def release(self) -> None:
        self._handle = None


class CommlibZeroCopy(Commlib):
    """commlib reading rows where they arrived, and y where the experts wrote it."""

    name = ZERO_COPY
    zero_copy = True

    def place(self, job: Job) -> Tensor:
        return self._ep.combine_buffer(self._handle).copy_(job.y)


class BareLimit(System):
    """The same rows moved with the same stores and no protocol: the machine's limit."""

    name = LIMIT

    def __init__(self, ep: Any, layout: str = "rank") -> None:
        self._ep, self.layout = ep, layout
        self._mover: BareMover | None = None

    def iterate(self, job: Job, launch: Launch, report: Report | None) -> tuple[Interval, Interval]:
        if self._mover is None:
            handle = self._ep.dispatch(job.x, job.topk_idx, layout=self.layout).handle
            self._mover = BareMover(self._ep, job.x, handle)
        dispatched, _ = launch.fenced(self._mover.send)
        combined, _ = launch.fenced(self._mover.pull)
        return dispatched, combined
