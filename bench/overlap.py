"""Measure communication beside compute: a dispatch beside a matmul, and a whole MoE layer.

    mpirun -n 1 python bench/overlap.py                 # a core for communication, the others for compute
    mpirun -n 2 python bench/overlap.py                 # on limited links, with the layer
    python bench/overlap.py --device cuda --ranks 4     # ranks are threads that share the GPU

With several ranks each rank's link is limited (`link_gbps=`): to `--link-gbps`, or so that the layer's
communication takes as long as its experts do. One rank has no link; it measures the dispatch alone. For what
is compared, and what efficiency means, see bench/overlap_matmul.py and bench/overlap_layer.py. Every value is
checked in the same run, before anything is timed. A rank on the CPU needs a core for each compute thread, and
one for each communication thread that does not wait for its link.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import overlap_layer, overlap_matmul
from bench.harness.machine import device_name, where
from bench.harness.ranks import Ranks, on_ranks
from bench.harness.report import NO_GPU, Titled, show, table
from bench.harness.samples import RESULTS, options, write_samples
from bench.harness.stats import Stats
from bench.harness.workload import Job, Shape, add_shape_arguments, require_equal_blocks
from bench.overlap_layer import Layer, LayerPlan, LayerResult
from bench.overlap_matmul import MatmulPlan, MatmulResult
from commlib import cuda

CPU_DEFAULTS = dict(hidden=1024, ffn_hidden=512, experts=4, topk=2, matmul=256, num_sms=[1], chunks=[4, 8])
GPU_DEFAULTS = dict(
    hidden=4096,
    ffn_hidden=1024,
    experts=32,
    topk=8,
    matmul=4096,
    num_sms=[1, 2, 4, 8, 16],
    chunks=[2, 4, 8],
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, tokens=4096)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:i")
    parser.add_argument("--ranks", type=int, default=4, help="on a GPU; on the CPU those of the launch")
    parser.add_argument("--num-sms", type=int, nargs="+", help="of a rank, to be swept (CPU: threads)")
    parser.add_argument("--link-gbps", type=float, help="GB/s of a rank's link, instead of a calibration")
    parser.add_argument("--matmul", type=int, help="rows and columns of the matmul")
    parser.add_argument("--ffn-hidden", type=int, help="of the layer's experts")
    parser.add_argument("--chunks", type=int, nargs="+", help="of the layer, one number after the other")
    parser.add_argument("--iters", type=int, default=7)
    parser.add_argument("--json", type=Path, help="default: bench/results/local/, named by device and ranks")
    parser.add_argument("--plot", type=Path, help="figure; default: beside the JSON, as PNG")
    device = parser.parse_known_args(argv)[0].device
    parser.set_defaults(**(CPU_DEFAULTS if device == "cpu" else GPU_DEFAULTS))
    args = parser.parse_args(argv)
    if min(args.iters, args.ranks, *args.num_sms, *args.chunks) < 1:
        parser.error("--iters, --ranks, --num-sms and --chunks are at least 1")
    return args


@dataclass(frozen=True)
class Measured:
    facts: dict[str, Any]
    link_gbps: float | None
    matmul: list[MatmulResult]
    layer: LayerResult | None


def shape_of(args: argparse.Namespace, dtype: torch.dtype) -> Shape:
    return Shape(args.tokens, args.hidden, args.experts, args.topk, dtype, args.seed)


def measure(ranks: Ranks, args: argparse.Namespace) -> Measured:
    """Called by all ranks."""
    require_equal_blocks(args.experts, ranks.size)
    dtype = torch.float32 if ranks.device == "cpu" else torch.bfloat16  # the one experts compute fastest in
    plan = LayerPlan(shape_of(args, dtype), args.ffn_hidden, args.chunks, args.iters)
    layer, link = None, args.link_gbps
    if ranks.size > 1:
        layer = Layer(ranks, plan)
        link = link or layer.link_gbps()
    shape = shape_of(args, torch.bfloat16)
    job = Job.build(shape, ranks.rank, ranks.size, ranks.device)
    matmul_plan = MatmulPlan(shape, args.matmul, args.iters, link)
    results = [overlap_matmul.measure(ranks, matmul_plan, job, n) for n in ranks.fitting(args.num_sms)]
    whole = None
    if layer is not None and link is not None:
        num_sms = overlap_matmul.best(results).num_sms
        whole = overlap_layer.measure(ranks, layer, plan, link, num_sms)
    return Measured(ranks.facts(), link, results, whole)


def link_of(measured: Measured) -> str:
    link = f", each with a link of {measured.link_gbps:.3g} GB/s" if measured.link_gbps else ""
    return f"{where(measured.facts)}{link}"


def unit(measured: Measured) -> str:
    return "SMs" if "gpu" in measured.facts else "threads"


def matmul_table(measured: Measured, args: argparse.Namespace, result: MatmulResult) -> Titled:
    """A dispatch beside a matmul, with one number of SMs."""
    parts, given = result.partition, ""
    if parts is not None:
        given = f" (partition: {parts['asked']} asked, {parts['comm']} given, {parts['compute']} left)"
    title = (
        f"{link_of(measured)}; {result.num_sms} {unit(measured)} of a rank for communication{given}. "
        f"Dispatch of T={args.tokens} H={args.hidden} bf16, top-{args.topk} of {args.experts}, beside "
        f"{result.repeats} matmuls of {args.matmul}^3, median of {args.iters}"
    )
    reached = {
        overlap_matmul.BOTH + suffix: overlap_matmul.efficiency(result.samples_s, suffix)
        for suffix in overlap_matmul.SUFFIXES
    }
    rows = [
        [name, Stats.of(seconds).text(), f"{reached[name]:.0%}" if reached.get(name) else ""]
        for name, seconds in result.samples_s.items()
    ]
    return title, ("", "ms (min-max)", "efficiency"), [rows]


def layer_table(measured: Measured, args: argparse.Namespace, layer: LayerResult) -> Titled:
    """The whole layer."""
    title = (
        f"{link_of(measured)}; {layer.num_sms} {unit(measured)} of a rank for communication. "
        f"MoE layer, forward and backward: T={args.tokens} H={args.hidden} F={args.ffn_hidden}, "
        f"top-{args.topk} of {args.experts}, median of {args.iters}"
    )
    rows = []
    for name, seconds in layer.samples_s.items():
        shares = ["", ""]
        if name not in overlap_layer.ALONE:
            speed_up = Stats.of(overlap_layer.speed_ups(layer.samples_s, name)).text(unit=1, digits=2)
            shares = [speed_up, f"{overlap_layer.efficiency(layer.samples_s, name):.0%}"]
        rows.append([name, Stats.of(seconds).text(), *shares])
    return title, ("", "ms (min-max)", "x sequence (min-max)", "efficiency"), [rows]


def notes(measured: Measured) -> list[str]:
    """Notes on efficiencies above 100 %."""
    found = [
        f"{result.num_sms} {unit(measured)}, {text}"
        for result in measured.matmul
        for suffix in overlap_matmul.SUFFIXES
        if (text := overlap_matmul.note(result.samples_s, suffix))
    ]
    if (layer := measured.layer) is not None:
        ways = [name for name in layer.samples_s if name not in overlap_layer.ALONE]
        found += [overlap_matmul.above(layer.samples_s, way, overlap_layer.alone(way)) for way in ways]
    return [text for text in found if text]


def publish(args: argparse.Namespace, measured: Measured) -> None:
    """Print the tables, and write every sample as JSON, and the figure."""
    facts = measured.facts
    tables = [matmul_table(measured, args, result) for result in measured.matmul]
    if measured.layer is not None:
        tables.append(layer_table(measured, args, measured.layer))
    for parts in tables:
        show(table(*parts))
    show(*notes(measured))
    path = args.json or RESULTS / f"overlap-{device_name(facts)}-r{facts['ranks']}.json"
    content = asdict(measured)
    write_samples(path, {"config": options(args), "machine": content.pop("facts")} | content)
    picture = args.plot or path.with_suffix(".png")
    try:
        plot(picture, measured)
    except ImportError as error:  # a borrowed machine may lack it
        show(f"every sample: {path}; no figure: {error}")
    else:
        show(f"every sample: {path}; figure: {picture}")


def plot(path: Path, measured: Measured) -> None:
    """Efficiency beside a matmul against SMs, and the layer's times."""
    import matplotlib.pyplot as plt

    width = 2 if measured.layer else 1
    figure, panels = plt.subplots(1, width, figsize=(6 * width, 4), squeeze=False, layout="constrained")
    axes = panels[0][0]
    for suffix, label in zip(overlap_matmul.SUFFIXES, ("no partition", "partition"), strict=True):
        points = [(r.num_sms, overlap_matmul.efficiency(r.samples_s, suffix)) for r in measured.matmul]
        points = [(n, 100 * e) for n, e in points if e is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel=f"communication {unit(measured)} of a rank", ylabel="overlap efficiency, %")
    axes.set_ylim(0, max(105, axes.get_ylim()[1]))
    axes.set(title="a dispatch beside a matmul", xticks=[r.num_sms for r in measured.matmul])
    axes.legend()
    if measured.layer is not None:
        plot_layer(panels[0][1], measured.layer)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def plot_layer(axes: Any, layer: LayerResult) -> None:
    """A bar for each way; lines from the fastest to the slowest sample."""
    names = list(layer.samples_s)
    stats = [Stats.of(layer.samples_s[name]) for name in names]
    ends = [[1e3 * (s.median - s.lowest) for s in stats], [1e3 * (s.highest - s.median) for s in stats]]
    colors = ["tab:gray" if name in overlap_layer.ALONE else "tab:blue" for name in names]
    axes.barh(names, [1e3 * s.median for s in stats], xerr=ends, color=colors)
    axes.invert_yaxis()
    axes.set(xlabel="ms", title="MoE layer, forward and backward")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.device != "cpu" and not cuda.is_available():
        print(f"bench/overlap.py --device {args.device} needs a GPU: {cuda.why_not()}", file=sys.stderr)
        sys.exit(NO_GPU)
    measured = on_ranks(args.device, args.ranks, partial(measure, args=args))
    if measured is not None:
        publish(args, measured)


if __name__ == "__main__":
    main()
