"""Ranks with a GPU each: commlib beside NCCL and other installed libraries for this, on the same routing.

    mpirun -n 8 python bench/dispatch_combine.py --device cuda
    torchrun --nproc-per-node 8 bench/dispatch_combine.py --device cuda --only commlib,nccl

NCCL refuses two ranks on one GPU; there bench/gpu.py compares with plain PyTorch. A process by itself runs
everything on one rank. The GPUs' clocks cannot be compared, so times are the host's, from the first rank's
begin to the moment when the last rank's GPU is done. Every system's answer is checked before any is timed: a
system that is wrong, or fails, is not timed, and the table says why; so it does for each missing system.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from bench.harness.facts import slug
from bench.harness.launch import Launch
from bench.harness.machine import gpu, host
from bench.harness.report import NO_GPU, Titled, markdown, one_line, show, table
from bench.harness.samples import RESULTS, options, write, write_samples
from bench.harness.seats import NoSeat, take_gpu
from bench.harness.stats import Stats
from bench.harness.turns import Samples, System, measure_throughput
from bench.harness.workload import Job, Shape, require_equal_blocks
from bench.systems.gpus import CHOICES, ORDER, PLAIN, TUNED, Setting, UntilDone

COLUMNS = ("", "system", "ms (min-max)", "GB/s/rank", "x plain", "x tuned")
SHORT = 42  # characters of a reason in the table's one line; the whole of it stands below
DEFAULTS = {"tokens": [4096], "experts": 256, "iters": 12, "warmup": 3}


@dataclass
class Outcome:
    """What was measured, and what was not; the same on all ranks.

    Attributes:
        missing: by system, why it was not measured.
        wrong: differences from what a job expects.
        rows: received by a rank, on average.
    """

    samples: Samples = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    rows: float = 0.0


def open_systems(setting: Setting, only: set[str], outcome: Outcome) -> list[System]:
    """The chosen systems that every rank can have. Called by all ranks."""
    systems: list[System] = []
    for key, choice in CHOICES.items():
        if key in only:
            made: list[System] = []
            why = setting.launch.agreed(choice.why_not(setting))
            if not why:
                why = setting.launch.agreed(_tried(lambda c=choice, m=made: m.extend(c.make(setting))))
            if why:
                outcome.missing |= dict.fromkeys(choice.names, why)
            else:
                systems += made
    return [UntilDone(system, setting.device) for system in systems]


def checked(launch: Launch, job: Job, systems: Sequence[System], outcome: Outcome) -> list[System]:
    """The systems that answer correctly on all ranks. Called by all ranks."""
    right = []
    for system in systems:
        wrong: list[str] = []
        # All ranks meet after each step, so that a rank that fails leaves none in the next.
        why = launch.agreed(_tried(lambda s=system, w=wrong: w.extend(s.wrong_rows(job, s.dispatch(job)))))
        why = why or launch.agreed(
            _tried(lambda s=system, w=wrong: w.extend(s.wrong_sum(job, s.combine(s.place(job)))))
        )
        system.release()
        texts = list(chain(*launch.gather([f"rank {launch.rank}: {text}" for text in wrong])))
        if why:  # then what the other ranks have is no answer
            outcome.missing[system.name] = why
        elif texts:
            outcome.missing[system.name] = f"WRONG, {texts[0]}"
            outcome.wrong += [f"{system.name}, {text}" for text in texts]
        else:
            right.append(system)
    return right


def _tried(run: Callable[[], Any]) -> str:
    """Run it; return its error in one line, or nothing."""
    try:
        run()
    except Exception as error:  # other libraries raise anything: assertions, drivers' errors
        return one_line(error)
    return ""


@contextmanager
def _setting(
    launch: Launch, shape: Shape, device: torch.device, num_sms: int | None, backend: str
) -> Iterator[Setting]:
    group = dist.new_group(backend=backend)
    with ExitStack() as stack:
        yield Setting(launch, shape, device, num_sms, group, stack)
    dist.destroy_process_group(group)


def compare(
    launch: Launch,
    shape: Shape,
    args: argparse.Namespace,
    device: torch.device,
    backend: str = "nccl",
) -> Outcome:
    """Measure all systems that can be had. Called by all ranks."""
    outcome = Outcome()
    job = Job.build(shape, launch.rank, launch.size, device)
    outcome.rows = statistics.mean(launch.gather(len(job.expected.rows)))
    with _setting(launch, shape, device, args.num_sms, backend) as setting:
        systems = checked(launch, job, open_systems(setting, args.only, outcome), outcome)
        outcome.samples, wrong = measure_throughput(launch, job, systems, args.iters, args.warmup)
        outcome.wrong += list(chain(*launch.gather(wrong)))
    return outcome


def rows_of_table(outcome: Outcome, row_bytes: int) -> Iterator[list[list[str]]]:
    """A section for each operation, and one for the missing systems."""
    for operation in ("dispatch", "combine"):
        stats = {name: Stats.of(times[operation]) for name, times in outcome.samples.items()}
        yield [
            [
                operation,
                name,
                stats[name].text(unit=1e-3, digits=2),
                f"{outcome.rows * row_bytes / stats[name].median / 1e9:.1f}",
                *(
                    f"{stats[to].median / stats[name].median:.1f}x" if to in stats else ""
                    for to in (PLAIN, TUNED)
                ),
            ]
            for name in ORDER
            if name in stats
        ]
    yield [["not timed", name, _short(outcome.missing[name])] for name in ORDER if name in outcome.missing]


def _short(reason: str) -> str:
    return reason if len(reason) <= SHORT else f"{reason[: SHORT - 1]}…"


def table_of(facts: dict[str, Any], shape: Shape, iters: int, outcome: Outcome) -> Titled:
    """Title, columns and sections."""
    where = "" if facts["hosts"] == 1 else f" on {facts['hosts']} hosts"
    dtype = str(shape.dtype).removeprefix("torch.")
    title = (
        f"{facts['ranks']} ranks{where}, each on one {facts['gpu']}, T={shape.tokens} H={shape.hidden} "
        f"{dtype}, top-{shape.topk} of {shape.experts} experts, NCCL {facts['nccl']}, median of {iters}"
    )
    return title, COLUMNS, list(rows_of_table(outcome, shape.hidden * shape.dtype.itemsize))


def publish(facts: dict[str, Any], shape: Shape, args: argparse.Namespace, outcome: Outcome) -> None:
    """Print the table; write it as Markdown, and every sample as JSON. Rank 0 only."""
    titled = table_of(facts, shape, args.iters, outcome)
    notes = [f"{name}: not timed: {why}" for name, why in outcome.missing.items()]
    name = f"nccl-{slug(facts['gpu'])}-r{facts['ranks']}-{datetime.date.today()}.json"
    path = args.json or RESULTS / name
    show(table(*titled), *notes, f"every sample: {path}")
    found = {"samples_s": outcome.samples, "rows": outcome.rows, "wrong": outcome.wrong}
    write_samples(path, {"config": options(args), "machine": facts, "missing": outcome.missing} | found)
    write(path.with_suffix(".md"), "\n".join([markdown(*titled), *(f"{note}.\n" for note in notes)]))


def end(launch: Launch, outcome: Outcome) -> None:
    """Exit with status 1 unless every answer was right and commlib, if asked for, was measured."""
    ours = [
        f"{name}: {outcome.missing[name]}" for name in CHOICES["commlib"].names if name in outcome.missing
    ]
    wrong = ["WRONG RESULTS", *outcome.wrong] if outcome.wrong else ours
    if wrong:
        sys.exit("\n".join(wrong) if launch.rank == 0 else 1)


def main(shape: Shape, args: argparse.Namespace) -> None:
    with Launch.session() as launch:
        try:
            device, hosts = take_gpu(launch)
        except NoSeat as error:
            if launch.rank == 0:
                print(f"bench/dispatch_combine.py --device cuda: {error}", file=sys.stderr)
            sys.exit(NO_GPU)
        require_equal_blocks(shape.experts, launch.size)
        outcome = compare(launch, shape, args, device)
        if launch.rank == 0:
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
            facts = host() | gpu(device.index) | {"ranks": launch.size, "hosts": hosts, "nccl": nccl}
            publish(facts, shape, args, outcome)
        end(launch, outcome)
