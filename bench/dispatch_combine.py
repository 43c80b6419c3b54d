"""Measure dispatch and combine over commlib, gloo and MPI, on the same routing, in one run.

    mpirun -n 4 python bench/dispatch_combine.py
    torchrun --nproc-per-node 4 bench/dispatch_combine.py      # without the MPI row
    mpirun -n 8 python bench/dispatch_combine.py --preset h800  # on links of that kind, slowed down
    mpirun -n 8 python bench/dispatch_combine.py --device cuda  # a GPU for each rank: gpu_comparison.py

The systems take turns, iteration by iteration and in changing order, so that whatever else the
machine does, and whatever is left in the caches, affects all of them. A time goes from the first
rank's begin to the last rank's end. Every system's answer is checked in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench import gpu_comparison, limited_link
from bench.harness.launch import Launch
from bench.harness.machine import machine, where
from bench.harness.report import NO_GPU, Titled, progress, show, table
from bench.harness.samples import RESULTS, options, write_samples
from bench.harness.stats import Stats
from bench.harness.turns import Intervals, Samples, System, job_spans, measure_throughput
from bench.harness.workload import Job, Shape, add_shape_arguments, require_equal_blocks
from bench.limited_link import add_link_arguments
from bench.systems.commlib import LIMIT, OWNED, ZERO_COPY
from bench.systems.cpus import CHOICES, GLOO, MPI, PLAIN, open_systems
from commlib import cuda
from commlib.cli.measuring import Interval, timed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LATENCY_BLOCK = 50  # iterations that a system runs before the next one's turn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, tokens=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--iters", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--latency-iters", type=int, default=1000, help="0: leave latency out")
    on_gpus = ",".join(gpu_comparison.CHOICES)
    parser.add_argument("--only", help=f"of {','.join(CHOICES)}; with --device cuda of {on_gpus}")
    parser.add_argument("--num-sms", type=int, help="commlib's threads, or SMs; default: its own choice")
    parser.add_argument("--json", type=Path, help="default: bench/results/local/, named by ranks")
    add_link_arguments(parser)
    choices: Iterable[str] = CHOICES
    if compares_gpus(parser.parse_known_args()[0]):
        parser.set_defaults(**gpu_comparison.DEFAULTS)
        choices = gpu_comparison.CHOICES
    args = parser.parse_args()
    args.only = set(choices if args.only is None else args.only.split(","))
    if not args.only <= set(choices):
        parser.error(f"--only takes {', '.join(choices)}")
    if min(args.tokens, args.hidden, args.topk, args.iters) < 1 or args.topk > args.experts:
        parser.error("sizes must be at least 1, and --topk at most --experts")
    if compares_gpus(args) and args.device != "cuda":
        parser.error("--device cuda: each rank takes a GPU of its own; bench/gpu.py compares on one")
    if args.device != "cpu" and not compares_gpus(args) and not cuda.is_available():
        print(f"--device {args.device} needs a GPU: {cuda.why_not()}", file=sys.stderr)
        sys.exit(NO_GPU)
    if args.latency_iters == 1 or args.latency_iters < 0:
        parser.error("--latency-iters takes 0 or at least 2")
    return args


def compares_gpus(args: argparse.Namespace) -> bool:
    """Whether the ranks have a GPU each, rather than a limited link."""
    return args.device != "cpu" and not (args.preset or args.link_gbps)


def measure_latency(launch: Launch, job: Job, systems: list[System], iters: int) -> tuple[Samples, list[str]]:
    """Seconds of dispatch + combine, back to back, blocks of iterations in turn."""

    def round_trip(system: System) -> Interval:
        (begin, middle), _ = timed(lambda: system.dispatch(job))
        y = system.place(job)
        (resumed, end), _ = timed(lambda: system.combine(y))
        system.release()
        return begin, end - (resumed - middle)

    wrong: list[str] = []
    for system in systems:
        system.iterate(job, launch, wrong.append)
    local: Intervals = {system.name: {"round_trip": []} for system in systems}
    with progress(launch.rank, "latency", (iters + LATENCY_BLOCK) * len(systems)) as bar:
        for done in range(-LATENCY_BLOCK, iters, LATENCY_BLOCK):  # the first block warms up
            block = min(LATENCY_BLOCK, iters - done)
            for system in systems:
                launch.fence()
                intervals = [round_trip(system) for _ in range(block)]
                if done >= 0:
                    local[system.name]["round_trip"] += intervals
                bar.update(block)
    return job_spans(launch, local), wrong


def run_throughput(launch: Launch, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    job = Job.build(shape, launch.rank, launch.size)
    with open_systems(launch, shape, args.only, args.num_sms) as systems:
        samples, wrong = measure_throughput(launch, job, systems, args.iters, args.warmup)
    return {
        "samples_s": samples,
        "wrong": list(chain(*launch.gather(wrong))),
        "rows_received": launch.gather(job.y.shape[0]),
    }


def run_latency(launch: Launch, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """One token on each of ranks 0 and 1; the others sleep. Rank 0 has the samples."""
    samples: Samples = {}
    wrong: list[str] = []
    pair = launch.first(2)
    if pair is not None:
        one = replace(shape, tokens=1)
        job = Job.build(one, pair.rank, pair.size)
        with open_systems(pair, one, args.only, args.num_sms) as systems:
            wanted = [system for system in systems if system.name not in (OWNED, LIMIT)]
            samples, wrong = measure_latency(pair, job, wanted, args.latency_iters)
    return {"samples_s": samples, "wrong": list(chain(*launch.gather(wrong)))}


def throughput_rows(
    operation: str, result: dict[str, Any], row_bytes: int, skipped: dict[str, str]
) -> Iterator[list[str]]:
    """The table's rows for dispatch or for combine."""
    stats = {name: Stats.of(times[operation]) for name, times in result["samples_s"].items()}
    moved = statistics.mean(result["rows_received"]) * row_bytes
    for name in (ZERO_COPY, OWNED, PLAIN, GLOO, MPI, LIMIT):
        if name in stats:
            median = stats[name].median
            yield [
                operation,
                name,
                stats[name].text(unit=1e-3, digits=1),
                f"{moved / median / 1e9:.2f}",
                *(f"{stats[g].median / median:.1f}x" if g in stats else "" for g in (PLAIN, GLOO)),
                f"{stats[LIMIT].median / median:.0%}" if LIMIT in stats else "",
            ]
        elif name in skipped:
            yield [operation, name, skipped[name]]


def latency_rows(samples: Samples, skipped: dict[str, str]) -> Iterator[list[str]]:
    stats = {name: Stats.of(times["round_trip"]) for name, times in samples.items()}
    for name in (ZERO_COPY, PLAIN, GLOO, MPI):
        if name in stats:
            ratio = f"{stats[GLOO].median / stats[name].median:.1f}x" if GLOO in stats else ""
            p90 = statistics.quantiles(samples[name]["round_trip"], n=10)[-1]
            median = stats[name].median
            yield ["dispatch + combine", name, f"{median * 1e6:.0f}", f"{p90 * 1e6:.0f}", ratio]
        elif name in skipped:
            yield ["dispatch + combine", name, skipped[name]]


def throughput_table(args: argparse.Namespace, found: dict[str, Any]) -> Titled:
    """Dispatch and combine, by system."""
    facts, row_bytes = found["machine"], args.hidden * DTYPES[args.dtype].itemsize
    title = (
        f"{where(facts)}, T={args.tokens} H={args.hidden} {args.dtype}, top-{args.topk} of {args.experts} "
        f"experts, median of {args.iters}"
    )
    sections = [
        throughput_rows(operation, found["throughput"], row_bytes, found["skipped"])
        for operation in ("dispatch", "combine")
    ]
    return title, ("", "system", "ms (min-max)", "GB/s/rank", "x plain", "x tuned", "of limit"), sections


def latency_table(args: argparse.Namespace, found: dict[str, Any]) -> Titled:
    """A dispatch and a combine of one token."""
    title = f"Latency: 1 token on each of 2 ranks, median of {args.latency_iters}"
    rows = latency_rows(found["latency"]["samples_s"], found["skipped"])
    return title, ("", "system", "µs", "90 % below", "x tuned gloo"), [rows]


def publish(launch: Launch, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the tables and write the JSON; rank 0 only."""
    skipped = {MPI: launch.no_mpi} if "mpi" in args.only and launch.no_mpi else {}
    found = {"config": options(args), "machine": machine(launch), "skipped": skipped} | result
    show(table(*throughput_table(args, found)))
    if "latency" in result:
        show(table(*latency_table(args, found)))
    path = args.json or RESULTS / f"dispatch_combine-cpu-r{launch.size}.json"
    write_samples(path, found)
    show(f"every sample: {path}")


def main() -> None:
    args = parse_arguments()
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk, DTYPES[args.dtype], args.seed)
    if args.preset or args.link_gbps:
        limited_link.main(shape, args)
        return
    if compares_gpus(args):
        gpu_comparison.main(shape, args)
        return
    with Launch.session() as launch:
        require_equal_blocks(shape.experts, launch.size)
        launch.share_cores()
        result = {"throughput": run_throughput(launch, shape, args)}
        if launch.size > 1 and args.latency_iters:
            result["latency"] = run_latency(launch, shape, args)
        if launch.rank == 0:
            publish(launch, args, result)
        wrong = [text for part in result.values() for text in part["wrong"]]
        if wrong:
            sys.exit("\n".join(["WRONG RESULTS", *wrong]) if launch.rank == 0 else 1)


if __name__ == "__main__":
    main()
