"""Make the tables of README.md and docs/ from the samples in bench/results/: `make figures`.

    python bench/figures.py            # rewrite the tables
    python bench/figures.py --check    # name the pages that differ from what the samples give; status 1 then

A table stands in any page between two comments, the first with its name: `<!-- figures: nodes -->`, and
`<!-- figures end -->`. Nothing else of a page is touched. FIGURES lists the names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import (
    cpu_paths,
    gpu,
    moe_layer,
    nodes,
    overlap_layer,
    overlap_matmul,
    scaling,
    validate_model,
)
from bench.harness.report import Titled, markdown, markdown_table
from bench.harness.samples import BENCH, RECORDED, write
from bench.harness.stats import Stats
from bench.systems.commlib import OWNED, ZERO_COPY
from bench.systems.cpus import PATHS
from bench.systems.layers import COMMLIB, GLOO, MPI
from bench.systems.nodes import HIERARCHICAL
from bench.systems.one_gpu import COMBINE, REDISPATCH, TUNED

ROOT = BENCH.parent
PLACE = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- figures end -->)", re.DOTALL)
ON_PATHS = "dispatch_combine-cpu-r4-paths"  # the samples of bench/cpu_paths.py
MARK = re.compile(r"<!-- figures\b")


def samples(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text())


def milliseconds(seconds: Sequence[float], digits: int = 0) -> str:
    return Stats.of(seconds).text(digits=digits)


def best_peer() -> str:
    """How many times as fast as the best peer: a line for each path and operation, a column for each size."""
    found = samples(ON_PATHS)
    rows = [
        [f"{path} path: {operation}", *cpu_paths.ratios(found, path, ZERO_COPY, operation)]
        for path in PATHS
        for operation in cpu_paths.OPERATIONS
    ]
    return markdown_table(("", *(f"T={tokens}" for tokens in found["config"]["tokens"])), rows, words=1)


def dispatch_and_combine() -> str:
    found = samples(ON_PATHS)
    args = argparse.Namespace(**found["config"])
    return "\n".join(markdown(*each) for each in cpu_paths.tables(args, found))


def layer() -> str:
    """A MoE layer over memory and over links, a column for each system."""
    systems = (COMMLIB, GLOO, MPI)
    memory, links = samples("moe_layer-cpu-r4"), samples("moe_layer-nodes-cpu")
    command = "python bench/moe_layer.py"
    limited = f"{command} --link-gbps {links['config']['link_gbps']} --nodes {links['config']['nodes']}"

    def row(name: str, of_system: Callable[[str], str]) -> list[str]:
        return [name, *(of_system(system) for system in systems)]

    rows = [
        row(
            f"shared memory, `mpirun -n {memory['machine']['ranks']} {command}`: ms",
            lambda system: f"{median(memory['samples_s'][system]) * 1e3:.0f}",
        ),
        row(
            "sent by the busiest rank: MB",
            lambda system: f"{moe_layer.moved_bytes(memory, system) / 1e6:.1f}",
        ),
        row(
            f"two nodes, `{limited}`: ms",
            lambda system: f"{median(links['samples_s'][system]) * 1e3:.0f}",
        ),
        row(
            "over the busiest link: MB",
            lambda system: f"{moe_layer.moved_bytes(links, system) / 1e6:.1f}",
        ),
    ]
    return markdown_table(("", "commlib", "gloo", "MPI"), rows, words=1)


def dispatch_beside_matmuls() -> str:
    """Alone and at once: on one rank, with a partition and without, and on two with links."""
    one, two = samples("overlap-cpu-r1"), samples("overlap-cpu-r2")
    cases = [
        ("one rank, a core each", one, ""),
        ("one rank, a partition", one, overlap_matmul.PARTED),
        (f"two ranks, links of {two['link_gbps']:.3f} GB/s", two, ""),
    ]
    rows = []
    for name, found, suffix in cases:
        (result,) = found["matmul"]
        times = result["samples_s"]
        parts = [overlap_matmul.COMMUNICATION, overlap_matmul.SHARE, overlap_matmul.BOTH]
        share = overlap_matmul.efficiency(times, suffix)
        rows.append([name, *(milliseconds(times[part + suffix], 1) for part in parts), f"{share:.0%}"])
    return markdown_table(("", "dispatch, ms", "matmuls, ms", "both, ms", "efficiency"), rows, words=1)


def layer_beside_communication() -> str:
    found = samples("overlap-cpu-r2")
    config, times = found["config"], found["layer"]["samples_s"]
    title = (
        f"layer, T={config['tokens']} H={config['hidden']} F={config['ffn_hidden']} fp32, "
        f"top-{config['topk']} of {config['experts']}, {found['machine']['ranks']} ranks"
    )
    rows = []
    for name, seconds in times.items():
        shares = ["", ""]
        if name not in overlap_layer.ALONE:
            faster = Stats.of(overlap_layer.speed_ups(times, name)).text(unit=1, digits=2)
            sequence = name == overlap_layer.SEQUENCE
            shares = ["" if sequence else faster, f"{overlap_layer.efficiency(times, name):.0%}"]
        rows.append([name, milliseconds(seconds), *shares])
    return markdown_table((title, "ms", "times faster", "efficiency"), rows, words=1)


def one_gpu() -> str:
    """A selection of the rows and columns that bench/gpu.py prints."""
    found = samples("nvidia-h100-80gb-hbm3-2026-11-26-gpu-r4")
    ((plan, record),) = gpu.recorded(found)
    columns = ("", "system", "SMs", "ms (min-max)", "GB/s/rank", "of copy")
    chosen = [
        *((REDISPATCH, ZERO_COPY, n) for n in ("4", "8", "33")),
        *((COMBINE, ZERO_COPY, n) for n in ("4", "8", "33")),
    ]
    chosen += [(COMBINE, OWNED, "8"), (COMBINE, TUNED, "")]
    printed = {
        tuple(row[:3]): row for op in (REDISPATCH, COMBINE) for row in gpu.rows_of_table(op, plan, record)
    }
    places = [gpu.COLUMNS.index(column) for column in columns]
    return markdown_table(columns, [[printed[key][place] for place in places] for key in chosen])


def untitled(titled: Titled) -> str:
    """A table of figures alone, for a page that says what they are."""
    _, columns, sections = titled
    return markdown_table(columns, [row for section in sections for row in section], words=0)


def across_nodes() -> str:
    """Milliseconds and share of the limit, a column for each rig."""
    found = samples("nodes-cpu")
    args = argparse.Namespace(**found["config"])
    columns = ["", *(f"{rig['nodes']} nodes, {rig['gbit']:g} Gb/s" for rig in found["rigs"])]
    cells: dict[str, list[str]] = {}
    for operation in ("dispatch", "combine"):
        for rig in found["rigs"]:
            for row in nodes.rows_of(rig, operation, nodes.row_bytes(args, rig)["per_node"]):
                _, system, ms, _, _, _, share, _ = row
                name = f"**{system}**" if system == HIERARCHICAL else system
                cells.setdefault(f"{operation}: {name}", []).append(f"{ms.split()[0]}, {share}")
    return markdown_table(columns, [[name, *row] for name, row in cells.items()], words=1)


FIGURES: dict[str, Callable[[], str]] = {
    "best-peer": best_peer,
    "dispatch-combine": dispatch_and_combine,
    "layer": layer,
    "overlap-matmul": dispatch_beside_matmuls,
    "overlap-layer": layer_beside_communication,
    "one-gpu": one_gpu,
    "nodes": across_nodes,
    "scaling-worked-out": lambda: untitled(scaling.predicted_table(scaling.predict())),
    "scaling-measured": lambda: untitled(scaling.measured_table(samples("scaling-cpu")["measured"])),
    "model-validation": validate_model.as_markdown,
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with the tables that the samples give.

    Raises:
        ValueError: a name that FIGURES lacks, or a place that does not end.
    """
    places = PLACE.findall(text)
    if len(MARK.findall(text)) != 2 * len(places):
        raise ValueError("a place for figures does not end before the next one begins")
    if unknown := {name for _, name, _ in places} - FIGURES.keys():
        raise ValueError(
            f"no figures are called {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}"
        )
    return PLACE.sub(lambda place: f"{place[1]}\n{FIGURES[place[2]]()}\n{place[3]}", text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    stale = {page: text for page in pages() if (text := filled(page.read_text())) != page.read_text()}
    for page, text in stale.items():
        print(page.relative_to(ROOT).as_posix(), "differs" if args.check else "rewritten")
        if not args.check:
            write(page, text)
    if stale and args.check:
        sys.exit("make figures: tables are not what the samples in bench/results/ give")


if __name__ == "__main__":
    main()
