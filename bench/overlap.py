"""Measure what communication beside compute costs: dispatch alone, a matmul alone, and both at once.

    mpirun -n 1 python bench/overlap.py          # one rank on two cores: a thread each

A rank needs a core for its communication thread and one for its matmul; with fewer cores the two take
turns, and nothing is gained. Efficiency is max(t_dispatch, t_matmul) / t_both: 100 % means that the
shorter of the two came for free.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
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
    parser.add_argument("--num-sms", type=int, default=1, help="communication threads of a rank")
    parser.add_argument("--compute-threads", type=int, default=1, help="torch's threads of a rank")
    parser.add_argument("--size", type=int, default=384, help="of the square fp32 matmul")
    parser.add_argument("--iters", type=int, default=15)
    parser.add_argument("--json", type=Path, help="default: bench/results/, named by ranks")
    return parser.parse_args()


class Workload:
    """A dispatch, and a matmul repeated so often that it takes about as long."""

    def __init__(self, ep: commlib.ExpertParallel, job: Job, size: int, launch: Launch) -> None:
        self._ep, self._job = ep, job
        self._a, self._b = torch.randn(size, size), torch.randn(size, size)
        self._c = torch.empty(size, size)
        self.repeats = 1
        for _ in range(3):  # first calls fault pages in and start threads
            self.matmul()
            self.dispatch()
        seconds = {f: self._median(f, launch) for f in (self.dispatch, self.matmul)}
        self.repeats = max(1, round(seconds[self.dispatch] / seconds[self.matmul]))

    def _median(self, operation: Callable[[], None], launch: Launch) -> float:
        return statistics.median(launch.spans([launch.fenced(operation)[0] for _ in range(5)]))

    def dispatch(self) -> None:
        self._ep.dispatch(self._job.x, self._job.topk_idx)

    def matmul(self) -> None:
        for _ in range(self.repeats):
            torch.mm(self._a, self._b, out=self._c)

    def both(self) -> None:
        dispatched = self._ep.dispatch(self._job.x, self._job.topk_idx, async_op=True)
        self.matmul()
        assert dispatched.event is not None
        dispatched.event.wait()


def measure(launch: Launch, work: Workload, iters: int) -> dict[str, list[float]]:
    """Seconds of each, in turns."""
    operations = {"dispatch": work.dispatch, "matmul": work.matmul, "both": work.both}
    local: dict[str, list[Interval]] = {name: [] for name in operations}
    with progress(launch, "overlap", iters) as bar:
        for _ in range(iters):
            for name, operation in operations.items():
                local[name].append(launch.fenced(operation)[0])
            bar.update()
    return {name: launch.spans(intervals) for name, intervals in local.items()}


def publish(launch: Launch, args: argparse.Namespace, samples: dict[str, list[float]], repeats: int) -> None:
    facts = machine(launch)
    stats = {name: Stats.of(seconds) for name, seconds in samples.items()}
    longer = max(stats["dispatch"].median, stats["matmul"].median)
    in_turn = stats["dispatch"].median + stats["matmul"].median
    both = stats["both"].median
    rows = [[name, "", stats[name].text(), ""] for name in ("dispatch", "matmul")]
    rows[1][1] = f"{repeats} x {args.size}^3 fp32"
    rows.append(["both at once", "", stats["both"].text(), f"{longer / both:.0%}"])
    title = (
        f"{launch.size} ranks on {facts['cores']} cores ({facts['cpu']}), each {args.num_sms} communication "
        f"and {args.compute_threads} compute threads; T={args.tokens} H={args.hidden} bf16"
    )
    show(table(title, ["", "", "ms (min-max)", "efficiency"], [rows]))
    show(f"one after the other: {in_turn * 1e3:.1f} ms; at once {in_turn / both:.2f} times faster")
    path = args.json or RESULTS / f"overlap-cpu-r{launch.size}.json"
    config = vars(args) | {"json": str(path), "matmul_repeats": repeats}
    write_json(path, {"config": config, "machine": facts, "samples_s": samples})


def main() -> None:
    args = parse_arguments()
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk, torch.bfloat16, args.seed)
    with Launch.session() as launch:
        torch.set_num_threads(args.compute_threads)
        needed = launch.size * (args.num_sms + args.compute_threads)
        if launch.rank == 0 and needed > usable_cores():
            show(f"note: {needed} threads on {usable_cores()} cores take turns; expect no gain")
        job = Job.build(shape, launch.rank, launch.size)
        with commlib.ExpertParallel(launch.ranks, device="cpu", num_sms=args.num_sms, **shape.sizes) as ep:
            work = Workload(ep, job, args.size, launch)
            samples = measure(launch, work, args.iters)
        if launch.rank == 0:
            publish(launch, args, samples, work.repeats)


if __name__ == "__main__":
    main()
