"""Measure communication beside compute: each alone, and both at once, with a partition and without.

    mpirun -n 1 python bench/overlap.py          # one rank on two cores: a thread each

Communication is a dispatch on `num_sms` threads, compute a matmul that is repeated so often that it takes
about as long. The partition (commlib.SMPartition) keeps each on cores of its own; without it the kernel
places the threads. Efficiency is max(t_communication, t_compute on its share) / t_both: 100 % means that the
shorter of the two came for free. A rank needs a core for each of its communication and compute threads.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Interval, Launch, Stats, add_shape_arguments, progress, usable_cores
from report import RESULTS, machine, show, table, write_json
from workload import Job, Shape

import commlib


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, tokens=4096)
    parser.add_argument(
        "--num-sms", type=int, nargs="+", default=[1], help="communication threads of a rank, to be swept"
    )
    parser.add_argument("--size", type=int, default=384, help="of the square fp32 matmul")
    parser.add_argument("--iters", type=int, default=15)
    parser.add_argument("--json", type=Path, help="default: bench/results/, named by ranks")
    parser.add_argument("--plot", type=Path, help="write a figure (PNG)")
    return parser.parse_args()


class Workload:
    """A dispatch, and a matmul repeated so often that it takes about as long, in a partition or not."""

    def __init__(
        self, ep: commlib.ExpertParallel, job: Job, size: int, partition: commlib.SMPartition | None
    ) -> None:
        self._ep, self._job, self._partition = ep, job, partition
        self._a, self._b = torch.randn(size, size), torch.randn(size, size)
        self._c = torch.empty(size, size)
        self.repeats = 1

    def warm_up(self) -> None:
        """First calls fault pages in and start threads."""
        for _ in range(3):
            self.compute()
            self.communicate()
            self.both()

    def inside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._partition is None else self._partition

    def communicate(self) -> None:
        self._start().wait()

    def compute(self) -> None:
        for _ in range(self.repeats):
            torch.mm(self._a, self._b, out=self._c)

    def both(self) -> None:
        event = self._start()
        self.compute()
        event.wait()

    def _start(self) -> commlib.Event:
        event = self._ep.dispatch(self._job.x, self._job.topk_idx, async_op=True).event
        assert event is not None
        return event


@dataclass
class Case:
    """One thing that is timed: what, where, on how many of torch's threads."""

    operation: Callable[[], None]
    inside: Callable[[], contextlib.AbstractContextManager[object]]
    threads: int

    def run(self, launch: Launch) -> Interval:
        with self.inside():
            torch.set_num_threads(self.threads)
            return launch.fenced(self.operation)[0]


def cases_of(free: Workload, parted: Workload | None, share: int) -> dict[str, Case]:
    """What is compared, by name; ``share``: torch's threads beside communication."""
    cases = {
        "communication": Case(free.communicate, free.inside, share),
        "compute, all cores": Case(free.compute, free.inside, usable_cores()),
        "compute, its share": Case(free.compute, free.inside, share),
        "both": Case(free.both, free.inside, share),
    }
    if parted is not None:
        cases["compute, partition"] = Case(parted.compute, parted.inside, share)
        cases["both, partition"] = Case(parted.both, parted.inside, share)
    return cases


def balance(launch: Launch, cases: dict[str, Case], workloads: list[Workload]) -> None:
    """Make compute about as long as communication."""

    def median(name: str) -> float:
        return statistics.median(launch.spans([cases[name].run(launch) for _ in range(5)]))

    repeats = max(1, round(median("communication") / median("compute, its share")))
    for work in workloads:
        work.repeats = repeats


def measure(launch: Launch, cases: dict[str, Case], iters: int) -> dict[str, list[float]]:
    """Seconds of each, in turns."""
    local: dict[str, list[Interval]] = {name: [] for name in cases}
    with progress(launch, "overlap", iters) as bar:
        for _ in range(iters):
            for name, case in cases.items():
                local[name].append(case.run(launch))
            bar.update()
    return {name: launch.spans(intervals) for name, intervals in local.items()}


def efficiency(samples: dict[str, list[float]], partition: bool) -> float | None:
    """max(t_communication, t_compute on its share) / t_both, of medians."""
    both = "both, partition" if partition else "both"
    if both not in samples:
        return None
    alone = "compute, partition" if partition else "compute, its share"
    longer = max(statistics.median(samples[name]) for name in ("communication", alone))
    return longer / statistics.median(samples[both])


def run(launch: Launch, args: argparse.Namespace, job: Job, shape: Shape, num_sms: int) -> dict:
    """Samples for one number of communication threads."""
    share = max(1, usable_cores() // launch.size - num_sms)
    can_part = launch.size == 1 and num_sms < usable_cores()
    partition = commlib.SMPartition(comm=num_sms, device="cpu") if can_part else None
    with contextlib.ExitStack() as stack:
        config = dict(device="cpu", num_sms=num_sms, **shape.sizes)
        free_ep = stack.enter_context(commlib.ExpertParallel(launch.ranks, **config))
        workloads = [Workload(free_ep, job, args.size, None)]
        if partition is not None:
            ep = stack.enter_context(commlib.ExpertParallel(launch.ranks, partition=partition, **config))
            workloads.append(Workload(ep, job, args.size, partition))
        cases = cases_of(workloads[0], workloads[1] if partition else None, share)
        for work in workloads:
            with work.inside():
                work.warm_up()
        balance(launch, cases, workloads)
        samples = measure(launch, cases, args.iters)
    return {
        "num_sms": num_sms,
        "compute_threads": share,
        "repeats": workloads[0].repeats,
        "samples_s": samples,
    }


def publish(launch: Launch, args: argparse.Namespace, results: list[dict]) -> None:
    facts = machine(launch)
    for result in results:
        samples = result["samples_s"]
        shares = {"both": efficiency(samples, False), "both, partition": efficiency(samples, True)}
        rows = [
            [name, Stats.of(seconds).text(), f"{shares[name]:.0%}" if shares.get(name) else ""]
            for name, seconds in samples.items()
        ]
        title = (
            f"{launch.size} ranks on {facts['cores']} cores ({facts['cpu']}), each {result['num_sms']} "
            f"communication and {result['compute_threads']} compute threads; T={args.tokens} H={args.hidden} "
            f"bf16; compute: {result['repeats']} x {args.size}^3 fp32"
        )
        show(table(title, ["", "ms (min-max)", "efficiency"], [rows]))
    path = args.json or RESULTS / f"overlap-cpu-r{launch.size}.json"
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_json(path, {"config": config, "machine": facts, "results": results})
    if args.plot:
        plot(args.plot, results)


def plot(path: Path, results: list[dict]) -> None:
    """Efficiency against the number of communication threads."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for partition, label in ((False, "no partition"), (True, "partition")):
        points = [(r["num_sms"], efficiency(r["samples_s"], partition)) for r in results]
        points = [(n, 100 * e) for n, e in points if e is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="communication threads", ylabel="overlap efficiency, %", ylim=(0, 105))
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    args = parse_arguments()
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk, torch.bfloat16, args.seed)
    with Launch.session() as launch:
        needed = launch.size * (max(args.num_sms) + 1)
        if launch.rank == 0 and needed > usable_cores():
            show(f"note: {needed} threads on {usable_cores()} cores take turns; expect no gain")
        job = Job.build(shape, launch.rank, launch.size)
        results = [run(launch, args, job, shape, num_sms) for num_sms in args.num_sms]
        if launch.rank == 0:
            publish(launch, args, results)


if __name__ == "__main__":
    main()
