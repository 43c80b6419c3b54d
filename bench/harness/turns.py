"""What is compared, behind one small interface, and how systems take turns on one job in changing order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.harness.launch import Launch
from bench.harness.orders import changing_orders
from bench.harness.report import progress
from bench.harness.workload import Job
from commlib.cli.measuring import Interval

Samples = dict[str, dict[str, list[float]]]  # system -> operation -> seconds, iteration by iteration
Intervals = dict[str, dict[str, list[Interval]]]  # the same on one rank, with begin and end
Report = Callable[[str], None]  # takes a difference from what a job expects


class System:
    """Something that dispatches and combines a job."""

    name: str

    def dispatch(self, job: Job) -> Any:
        """Timed: ends when the rows can be read. What the job checks: a Received or a Grouped."""
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

    def wrong_rows(self, job: Job, received: Any) -> list[str]:
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


def measure_throughput(
    launch: Launch,
    job: Job,
    systems: list[System],
    iters: int,
    warmup: int,
    title: str = "dispatch and combine",
) -> tuple[Samples, list[str]]:
    """Seconds of every iteration, and what was wrong in the first and the last one.

    Args:
        title: of the bar that shows how far it is.
    """
    wrong: list[str] = []
    local: Intervals = {system.name: {"dispatch": [], "combine": []} for system in systems}
    total = warmup + iters
    with progress(launch.rank, title, total * len(systems)) as bar:
        for i, order in enumerate(changing_orders(systems, total)):
            report = wrong.append if i in (0, total - 1) else None
            for system in order:
                dispatched, combined = system.iterate(job, launch, report)
                if i >= warmup:
                    local[system.name]["dispatch"].append(dispatched)
                    local[system.name]["combine"].append(combined)
                bar.update()
    return job_spans(launch, local), wrong


def job_spans(launch: Launch, local: Intervals) -> Samples:
    return {
        system: {operation: launch.spans(intervals) for operation, intervals in operations.items()}
        for system, operations in local.items()
    }
