"""The rows of the table: commlib, gloo, MPI and the bare limit behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from baselines import AllToAllBaseline, GlooBaseline, MpiBaseline, PlainGlooBaseline
from common import Interval, Launch
from torch import Tensor
from workload import Job, Received, Shape

CHOICES = ("commlib", "gloo", "mpi")
ZERO_COPY, OWNED, PLAIN, GLOO, MPI, LIMIT = (
    "commlib zero-copy",
    "commlib owned",
    "gloo, plain",
    "gloo, tuned",
    "MPI",
    "bare limit",
)

Report = Callable[[str], None]


class System:
    """Something that dispatches and combines a job."""

    name: str

    def dispatch(self, job: Job) -> Received:
        """Timed: ends when the rows can be read."""
        raise NotImplementedError

    def place(self, job: Job) -> Tensor:
        """Not timed: write y where an expert's last matmul would.

        Every system finds y freshly written, as after real experts, so none has warmer caches.
        """
        return job.output.copy_(job.y)

    def combine(self, y: Tensor) -> Tensor:
        """Timed: ends when the sums can be read."""
        raise NotImplementedError

    def release(self) -> None:
        """Not timed: give back what the dispatch lent."""

    def wrong_rows(self, job: Job, received: Received) -> list[str]:
        """The differences from what the job's dispatch must yield."""
        return job.wrong_rows(received)

    def wrong_sum(self, job: Job, out: Tensor) -> list[str]:
        """The differences from what the job's combine must yield."""
        return job.wrong_sum(out)

    def iterate(self, job: Job, launch: Launch, report: Report | None) -> tuple[Interval, Interval]:
        """One dispatch and one combine; when each began and ended on this rank. Called on all ranks.

        Args:
            report: called with each difference from what the job expects; None: do not look.
        """
        dispatched, received = launch.fenced(lambda: self.dispatch(job))
        wrong = [] if report is None else self.wrong_rows(job, received)
        y = self.place(job)
        combined, out = launch.fenced(lambda: self.combine(y))
        if report is not None:
            for text in wrong + self.wrong_sum(job, out):
                report(f"{self.name}, rank {launch.rank}: {text}")
        self.release()
        return dispatched, combined


class Baseline(System):
    """gloo, MPI, NCCL, ...: an all-to-all."""

    def __init__(self, name: str, transport: AllToAllBaseline) -> None:
        self.name, self._transport = name, transport

    def dispatch(self, job: Job) -> Received:
        rows = self._transport.dispatch(job.x, job.topk_idx, job.topk_weights)
        return Received(rows, self._transport.topk_idx, self._transport.topk_weights)

    def combine(self, y: Tensor) -> Tensor:
        return self._transport.combine(y)


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

    def __init__(self, ep: Any) -> None:
        from commlib.bench_support import BareMover

        self._ep, self._make, self._mover = ep, BareMover, None

    def iterate(self, job: Job, launch: Launch, report: Report | None) -> tuple[Interval, Interval]:
        if self._mover is None:
            handle = self._ep.dispatch(job.x, job.topk_idx).handle
            self._mover = self._make(self._ep, job.x, handle)
        dispatched, _ = launch.fenced(self._mover.send)
        combined, _ = launch.fenced(self._mover.pull)
        return dispatched, combined


@contextmanager
def open_systems(
    launch: Launch, shape: Shape, only: set[str], num_sms: int | None = None
) -> Iterator[list[System]]:
    """Those of `CHOICES` that are in `only` and can run here, ready to be measured."""
    sizes = shape.sizes
    with ExitStack() as stack:
        systems: list[System] = []
        if "commlib" in only:
            import commlib

            ep = commlib.ExpertParallel(launch.ranks, device="cpu", num_sms=num_sms, **sizes)
            stack.callback(ep.close)
            systems += [CommlibZeroCopy(ep), Commlib(ep), BareLimit(ep)]
        if "gloo" in only:
            systems.append(Baseline(PLAIN, PlainGlooBaseline(launch.group, **sizes)))
            systems.append(Baseline(GLOO, GlooBaseline(launch.group, **sizes)))
        if "mpi" in only and launch.comm is not None:
            systems.append(Baseline(MPI, MpiBaseline(launch.comm, **sizes)))
        yield systems
