"""What a slow link leaves: dispatch and combine where each rank's link is throttled to a given rate.

    mpirun -n 8 python bench/dispatch_combine.py --preset h800
    python bench/dispatch_combine.py --preset h800 --device cuda --ranks 4   # threads that share a GPU

(or `--link-gbps` instead of a preset). Memory of one machine is slower than the links of several GPUs, so a
preset's rate is divided by `--slow-down`, and everything scales with it. Shown on that link:

* how few communication SMs (CPU: threads) of a rank fill it: the smallest number with which dispatch and
  combine both reach 95 % of it. The rest uses that number;
* commlib: each token once to each rank that owns one of its experts;
* a row for each of a token's experts, as a plain all-to-all sends them, through the same code (each pair of
  token and expert is a token of its own);
* commlib's dispatch beside a matmul of the same length, against one after the other.

Times are compared with the link's own: bytes that must cross it, over its rate. Rows are checked first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import commlib
from bench.harness.machine import device_name, where
from bench.harness.ranks import Case, Ranks, interleaved, on_ranks
from bench.harness.report import Titled, show, table
from bench.harness.samples import RESULTS, options, write_samples
from bench.harness.stats import Stats
from bench.harness.workload import Job, LinkRows, Received, Shape, WrongResults, require_equal_blocks
from bench.overlap_matmul import Matmul, above
from commlib.model import Config


@dataclass(frozen=True)
class Preset:
    """A link's rate in GB/s, one direction, and its source."""

    gbps: float
    source: str


PRESETS = {
    "h800": Preset(160, "achievable on NVLink, by DeepEP's docs/legacy.md"),
    "h100": Preset(450, "NVLink 4: 900 GB/s both ways, by NVIDIA's datasheet"),
    "h20": Preset(450, "NVLink 4: 900 GB/s both ways, by NVIDIA's datasheet"),
    "pcie5": Preset(63, "16 lanes of 32 GT/s with 128b/130b coding"),
}
FULL = 0.95  # of the link
DISPATCH, COMBINE, MATMUL, BESIDE = "dispatch", "combine", "matmul", "dispatch beside matmul"
EACH = ", a row for each expert"
Samples = dict[str, list[float]]
Inputs = tuple[Tensor, Tensor, Tensor]  # x, topk_idx, topk_weights


@dataclass(frozen=True)
class DeviceDefaults:
    """Defaults by kind of device. A GPU is assumed to carry the links of its 4 ranks at their own rate."""

    slow_down: float
    num_sms: Sequence[int]  # tried one after the other
    matmul: int  # rows and columns of the matmul beside a dispatch


DEFAULTS = {
    "cpu": DeviceDefaults(400, (1, 2), 192),
    "cuda": DeviceDefaults(1, (1, 2, 4, 6, 8, 12, 16, 24), 2048),
}


def add_link_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a limited link."""
    group = parser.add_argument_group("a limited link (instead of the comparison)")
    group.add_argument("--preset", choices=PRESETS, help="a kind of link")
    group.add_argument("--link-gbps", type=float, help="GB/s of each rank's link, instead of a preset")
    group.add_argument("--slow-down", type=float, help="divides a preset's rate; default: CPU 400, GPU 1")
    group.add_argument("--sweep", type=int, nargs="+", help="numbers of SMs (CPU: threads) of a rank to try")
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:i")
    group.add_argument("--ranks", type=int, default=4, help="on a GPU; on the CPU those of the launch")


@dataclass(frozen=True)
class Measured:
    """Seconds on the link.

    Attributes:
        rows_on_link: of the busiest rank, one direction.
        sweep_s: of dispatch and of combine, by SMs of a rank.
        num_sms: the smallest number that fills the link, or the one that came nearest.
        samples_s: with this number.
    """

    facts: dict[str, Any]
    gbps: float
    slow_down: float
    rows_on_link: LinkRows
    row_bytes: int
    sweep_s: dict[int, Samples]
    num_sms: int
    samples_s: Samples

    def share(self, name: str, seconds: Sequence[float]) -> float:
        """The share of the link's rate: bytes that must cross it, over the median."""
        return self.least_s(name) / statistics.median(seconds)

    def least_s(self, name: str) -> float:
        """Seconds that the link needs."""
        rows = self.rows_on_link.each if name.endswith(EACH) else self.rows_on_link.unique
        return rows * self.row_bytes / (self.gbps * 1e9)


def filling(shares: Mapping[int, float]) -> int:
    """The smallest number of SMs whose share of the link is FULL, or the one that comes nearest."""
    full = [num_sms for num_sms, share in shares.items() if share >= FULL]
    return min(full) if full else max(shares, key=shares.__getitem__)


class Rows:
    """Dispatch and combine of tokens, each with the experts in its row of topk_idx."""

    def __init__(self, ep: commlib.ExpertParallel, inputs: Inputs) -> None:
        self.ep, self._inputs = ep, inputs
        self.d = ep.dispatch(*self._inputs)

    def dispatch(self) -> None:
        self.d = self.ep.dispatch(*self._inputs)

    def combine(self) -> None:
        self.ep.combine(self.d.x, self.d.handle)

    def beside(self, matmul: Matmul) -> None:
        d = self.ep.dispatch(*self._inputs, async_op=True)
        matmul.run()
        d.finish()

    def check(self, job: Job) -> None:
        """Raise WrongResults unless rows and sums are the job's."""
        self.dispatch()
        wrong = job.wrong_rows(Received(self.d.x, self.d.topk_idx, self.d.topk_weights))
        wrong += job.wrong_sum(self.ep.combine(job.y, self.d.handle))
        if wrong:
            raise WrongResults(f"rank {self.ep.rank}: {'; '.join(wrong)}")


def open_rows(
    stack: ExitStack, ranks: Ranks, shape: Shape, inputs: Inputs, capacity: int | None = None, **options: Any
) -> Rows:
    """A communicator for the inputs, closed by the stack. Called by all ranks."""
    sizes = shape.sizes | {"capacity": capacity}
    ep = commlib.ExpertParallel(ranks.group, device=ranks.device, **sizes, **options)
    stack.callback(ep.close)
    return Rows(ep, inputs)


def open_pairs(stack: ExitStack, ranks: Ranks, shape: Shape, job: Job, **options: Any) -> Rows:
    """The same where each pair of token and expert is a token of its own."""
    each = replace(shape, topk=1, tokens=shape.tokens * shape.topk)
    owner = job.topk_idx.flatten() // (shape.experts // ranks.size)
    sent = torch.bincount(owner, minlength=ranks.size).tolist()
    received = map(sum, zip(*ranks.gather(sent), strict=True))
    inputs = (
        job.x.repeat_interleave(shape.topk, dim=0),
        job.topk_idx.reshape(-1, 1),
        job.topk_weights.reshape(-1, 1),
    )
    # A GPU's slots are taken whole: the worst case of that many tokens would not fit.
    return open_rows(stack, ranks, each, inputs, capacity=max(received), **options)


def sweep(ranks: Ranks, shape: Shape, job: Job, args: argparse.Namespace, gbps: float) -> dict[int, Samples]:
    """Dispatch and combine with each number of SMs, in turns."""
    tried = [args.num_sms] if args.num_sms else args.sweep or DEFAULTS[kind_of(ranks)].num_sms
    inputs = (job.x, job.topk_idx, job.topk_weights)
    with ExitStack() as stack:
        cases: dict[str, Case] = {}
        fitting = ranks.fitting(tried)
        for num_sms in fitting:
            rows = open_rows(stack, ranks, shape, inputs, num_sms=num_sms, link_gbps=gbps)
            rows.check(job)
            cases |= {
                f"{num_sms} {DISPATCH}": Case(rows.dispatch),
                f"{num_sms} {COMBINE}": Case(rows.combine),
            }
        samples = interleaved(ranks, cases, args.iters, "SMs")
    return {n: {name: samples[f"{n} {name}"] for name in (DISPATCH, COMBINE)} for n in fitting}


def compare(
    ranks: Ranks, shape: Shape, job: Job, args: argparse.Namespace, gbps: float, num_sms: int
) -> Samples:
    """Once to each rank, a row for each expert, and a dispatch beside a matmul."""
    options: dict[str, Any] = dict(num_sms=num_sms, link_gbps=gbps)
    with ExitStack() as stack:
        inputs = (job.x, job.topk_idx, job.topk_weights)
        once = open_rows(stack, ranks, shape, inputs, **options)
        each = open_pairs(stack, ranks, shape, job, **options)
        matmul = Matmul(DEFAULTS[kind_of(ranks)].matmul, ranks.device)
        matmul.balance(ranks, Case(matmul.run), Case(once.dispatch))
        cases = {
            DISPATCH: Case(once.dispatch),
            DISPATCH + EACH: Case(each.dispatch),
            COMBINE: Case(once.combine),
            COMBINE + EACH: Case(each.combine),
            MATMUL: Case(matmul.run),
            BESIDE: Case(partial(once.beside, matmul)),
        }
        for case in cases.values():
            case.timed(ranks)
        return interleaved(ranks, cases, args.iters, "limited link")


def kind_of(ranks: Ranks) -> str:
    return "cpu" if ranks.device == "cpu" else "cuda"


def measure(ranks: Ranks, shape: Shape, args: argparse.Namespace) -> Measured:
    """Called by all ranks."""
    require_equal_blocks(shape.experts, ranks.size)
    slow_down = args.slow_down or DEFAULTS[kind_of(ranks)].slow_down
    gbps = args.link_gbps or PRESETS[args.preset].gbps / slow_down
    job = Job.build(shape, ranks.rank, ranks.size, ranks.device)
    mine = LinkRows.of(job.topk_idx, shape.experts // ranks.size, ranks.rank)
    on_link = LinkRows.busiest(ranks.gather(mine))
    swept = sweep(ranks, shape, job, args, gbps)
    row_bytes = shape.hidden * shape.dtype.itemsize
    found = Measured(ranks.facts(), gbps, slow_down, on_link, row_bytes, swept, 0, {})
    num_sms = filling({n: min(found.share(*one) for one in samples.items()) for n, samples in swept.items()})
    return replace(found, num_sms=num_sms, samples_s=compare(ranks, shape, job, args, gbps, num_sms))


def title_of(measured: Measured, args: argparse.Namespace) -> str:
    facts, link = measured.facts, f"{measured.gbps:g} GB/s"
    if args.preset and not args.link_gbps:
        preset = PRESETS[args.preset]
        link = (
            f"{args.preset}'s {preset.gbps:g} GB/s ({preset.source}) slowed down {measured.slow_down:g} times"
        )
    return (
        f"{where(facts)}, a link of {link} each; "
        f"T={args.tokens} H={args.hidden} {args.dtype}, top-{args.topk} of {args.experts}"
    )


def sweep_table(measured: Measured) -> Titled:
    """How few SMs fill the link."""
    rows = [
        [str(num_sms), name, Stats.of(seconds).text(), f"{measured.share(name, seconds):.0%}"]
        for num_sms, samples in measured.sweep_s.items()
        for name, seconds in samples.items()
    ]
    unit = "SMs" if "gpu" in measured.facts else "threads"
    return f"By {unit} of a rank", (unit, "", "ms (min-max)", "of the link"), [rows]


def comparison_table(measured: Measured, args: argparse.Namespace) -> Titled:
    """What the link leaves."""
    rows = []
    for name, seconds in measured.samples_s.items():
        held = ["", "", ""]
        if name not in (MATMUL, BESIDE):
            least = measured.least_s(name)
            moved = least * measured.gbps * 1e3
            held = [f"{moved:.1f}", f"{least * 1e3:.1f}", f"{measured.share(name, seconds):.0%}"]
        rows.append([name, Stats.of(seconds).text(), *held])
    return (
        title_of(measured, args),
        ("", "ms (min-max)", "MB on the link", "ms it needs", "of the link"),
        [rows],
    )


def findings(measured: Measured, config: Config) -> list[str]:
    """What the tables say, beside what the model says."""
    unit = "SMs" if "gpu" in measured.facts else "threads"
    worst = min(measured.share(*one) for one in measured.sweep_s[measured.num_sms].items())
    enough = "is the smallest number that reaches" if worst >= FULL else "comes nearest; none reaches"
    median = {name: statistics.median(seconds) for name, seconds in measured.samples_s.items()}
    unique = config.routing.unique_ranks
    rows = measured.rows_on_link
    return [
        f"{measured.num_sms} {unit} of a rank: {worst:.1%} of the link, which {enough} {FULL:.0%}",
        f"once to each rank: {rows.each / rows.unique:.2f} times fewer bytes on the link, dispatch "
        f"{median[DISPATCH + EACH] / median[DISPATCH]:.2f} times faster, combine "
        f"{median[COMBINE + EACH] / median[COMBINE]:.2f}; expected: K / U = {config.topk} / {unique:.2f} = "
        f"{config.topk / unique:.2f}, U = sum over ranks of 1 - C(E-n, K) / C(E, K) (commlib.model)",
        f"a dispatch and a matmul: {(median[DISPATCH] + median[MATMUL]) / median[BESIDE]:.2f} times faster "
        f"beside each other than in sequence, "
        f"{max(median[DISPATCH], median[MATMUL]) / median[BESIDE]:.0%} of what overlap can reach",
        *filter(None, [above(measured.samples_s, BESIDE, (DISPATCH, MATMUL))]),
    ]


def publish(args: argparse.Namespace, measured: Measured) -> None:
    """Print the tables and write every sample as JSON."""
    facts = measured.facts
    show(table(*comparison_table(measured, args)), table(*sweep_table(measured)))
    config = Config(facts["ranks"], args.tokens, args.hidden, args.topk, args.experts)
    show(*findings(measured, config))
    path = args.json or RESULTS / f"limited_link-{device_name(facts)}-r{facts['ranks']}.json"
    content = asdict(measured)
    write_samples(path, {"config": options(args), "machine": content.pop("facts")} | content)
    show(f"every sample: {path}")


def main(shape: Shape, args: argparse.Namespace) -> None:
    measured = on_ranks(args.device, args.ranks, partial(measure, shape=shape, args=args))
    if measured is not None:
        publish(args, measured)
