"""A dispatch beside a matmul: each alone and both at once, with a partition and without, by number of SMs.

SMs are communication threads on the CPU. The matmul is repeated until it takes about as long as the dispatch.
Efficiency is max(t_communication, t_compute on its share) / t_both: 100 % means that the shorter of the two
came for free.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import commlib
from bench.harness.ranks import Case, Ranks, interleaved
from bench.harness.stats import Stats
from bench.harness.workload import Job, Received, Shape, WrongResults

COMMUNICATION, EVERYTHING, SHARE, BOTH = (
    "communication",
    "compute, everything",
    "compute, its share",
    "both",
)
PARTED = ", partition"
SUFFIXES = ("", PARTED)
WARMUP = 3
TRIAL = 16  # repeats of a matmul, to see how long one takes
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class MatmulPlan:
    """The measurement: a job's dispatch over a link, beside a square matmul."""

    shape: Shape
    size: int  # rows and columns of the matmul
    iters: int
    link_gbps: float | None


@dataclass(frozen=True)
class MatmulResult:
    """Seconds with one number of communication SMs of a rank, iteration by iteration.

    Attributes:
        partition: SMs or cores asked for communication, given to it, and left to compute.
        repeats: of the matmul.
        compute_threads: of a rank, on the CPU, where it shares the cores with communication.
    """

    num_sms: int
    partition: dict[str, int] | None
    repeats: int
    compute_threads: int | None
    samples_s: Samples


class Matmul:
    """A square product, repeated. Hosts are best at fp32, GPUs at bf16."""

    def __init__(self, size: int, device: str) -> None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._a, self._b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        self._c = torch.zeros_like(self._a)
        self.repeats = TRIAL

    def run(self) -> None:
        for _ in range(self.repeats):
            torch.mm(self._a, self._b, out=self._c)

    def clear(self) -> None:
        self._c.zero_()

    def is_right(self) -> bool:
        return bool((self._c == self._a.shape[0]).all())

    def balance(self, ranks: Ranks, case: Case, other: Case) -> None:
        """Make ``case``, which runs this, take about as long as ``other``. Called by all ranks."""
        self.repeats = TRIAL
        self.repeats = max(1, round(TRIAL * ranks.fastest(other) / ranks.fastest(case)))


class Workload:
    """A dispatch, and a matmul beside it."""

    def __init__(self, ep: commlib.ExpertParallel, job: Job, matmul: Matmul) -> None:
        self._ep, self._job, self._matmul = ep, job, matmul

    def communicate(self) -> None:
        self._start().finish()

    def both(self) -> None:
        d = self._start()
        self._matmul.run()
        d.finish()

    def check(self) -> None:
        """Raise WrongResults unless both, run at once, give right results."""
        self._matmul.clear()
        d = self._start()
        self._matmul.run()
        got = d.finish()
        wrong = self._job.wrong_rows(Received(got.x, got.topk_idx, got.topk_weights))
        if not self._matmul.is_right():
            wrong.append("the matmul differs")
        if wrong:
            raise WrongResults(f"rank {self._ep.rank}: {'; '.join(wrong)}")

    def _start(self) -> commlib.Dispatched:
        job = self._job
        return self._ep.dispatch(job.x, job.topk_idx, job.topk_weights, async_op=True)


@contextmanager
def computing(partition: commlib.SMPartition | None, threads: int | None) -> Iterator[None]:
    """Compute in a partition, if there is one, and with ``threads`` torch threads (None: unchanged)."""
    with ExitStack() as stack:
        if threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
        if partition is not None:
            stack.enter_context(partition)
        if threads is not None:
            torch.set_num_threads(threads)
        yield


def measure(ranks: Ranks, plan: MatmulPlan, job: Job, num_sms: int) -> MatmulResult:
    """Called by all ranks.

    Raises:
        WrongResults: rows or products are not what they must be.
    """
    partition = ranks.partition(num_sms)
    everything = ranks.cores
    share = None if everything is None else max(1, everything - num_sms)
    matmul = Matmul(plan.size, ranks.device)
    with ExitStack() as stack:

        def workload(partition: commlib.SMPartition | None) -> Workload:
            config: dict[str, Any] = dict(device=ranks.device, num_sms=num_sms, link_gbps=plan.link_gbps)
            ep = commlib.ExpertParallel(ranks.group, partition=partition, **config, **plan.shape.sizes)
            return Workload(stack.enter_context(ep), job, matmul)

        def cases(work: Workload, partition: commlib.SMPartition | None, suffix: str) -> dict[str, Case]:
            inside = partial(computing, partition, share)
            return {
                COMMUNICATION + suffix: Case(work.communicate, inside),
                SHARE + suffix: Case(matmul.run, inside),
                BOTH + suffix: Case(work.both, inside),
            }

        free = workload(None)
        compared = cases(free, None, "")
        compared[EVERYTHING] = Case(matmul.run, partial(computing, None, everything))
        if share is None:
            del compared[SHARE]  # only a partition shares out a GPU's SMs
        works = [free]
        if partition is not None:
            works.append(workload(partition))
            compared |= cases(works[1], partition, PARTED)
        for work, inside in zip(works, (None, partition), strict=False):
            with computing(inside, share):
                for _ in range(WARMUP):
                    work.check()
        alone = next(compared[name] for name in (SHARE, SHARE + PARTED, EVERYTHING) if name in compared)
        matmul.balance(ranks, alone, compared[COMMUNICATION])
        samples = interleaved(ranks, compared, plan.iters, f"{num_sms} SMs beside a matmul")
    given = None
    if partition is not None:
        given = {"asked": partition.asked, "comm": partition.comm, "compute": partition.compute}
    return MatmulResult(num_sms, given, matmul.repeats, share, samples)


def efficiency(samples: Samples, suffix: str) -> float | None:
    """max(t_communication, t_compute on its share) / t_both, of medians, with a partition (suffix PARTED) or
    without; None: not measured.

    On a GPU without a partition compute has no share: it is compared with the partition's.
    """
    return reached(samples, BOTH + suffix, alone(samples, suffix)) if BOTH + suffix in samples else None


def alone(samples: Samples, suffix: str) -> tuple[str, str]:
    """The times that both at once are compared with."""
    shares = [SHARE + suffix, SHARE + PARTED, EVERYTHING]
    return COMMUNICATION + suffix, next(name for name in shares if name in samples)


def note(samples: Samples, suffix: str) -> str:
    """Why the efficiency is above 100 %, where it is."""
    if BOTH + suffix not in samples:
        return ""
    both, parts = BOTH + suffix, alone(samples, suffix)
    if not suffix and SHARE + PARTED in parts and is_above(reached(samples, both, parts)):
        return (
            f"{both}: above 100 %, for compute is held against its share of a partition, and had all SMs "
            "here that communication left"
        )
    return above(samples, both, parts)


def reached(samples: Samples, both: str, parts: Sequence[str]) -> float:
    """The longer of the parts over both at once, of medians."""
    return max(statistics.median(samples[part]) for part in parts) / statistics.median(samples[both])


def is_above(share: float) -> bool:
    """Whether a share is shown as more than 100 %."""
    return round(100 * share) > 100


def above(samples: Samples, both: str, parts: Sequence[str]) -> str:
    """Why ``both`` reaches more than 100 %, where it does, though it contains what it is compared with."""
    if not is_above(reached(samples, both, parts)):
        return ""
    longer = max(parts, key=lambda part: statistics.median(samples[part]))
    fastest = max(min(samples[part]) for part in parts) / min(samples[both])
    why = "times vary too much, as beside other work on the machine"
    if is_above(fastest):
        why = "parts took longer by themselves than within, as a whole may whose chunks fit a cache"
    ms, by_itself = (Stats.of(samples[name]).text() for name in (both, longer))
    return (
        f"{both}: above 100 %, though it contains {longer}: {ms} ms, and "
        f"{by_itself} for that alone. Of the fastest samples it is {fastest:.0%}: {why}"
    )


def best(results: Sequence[MatmulResult]) -> MatmulResult:
    """The result of the highest efficiency, with a partition or without."""
    return max(results, key=lambda r: max(efficiency(r.samples_s, suffix) or 0.0 for suffix in SUFFIXES))
