"""Measure dispatch and combine across nodes whose links are limited for real. As root: `make bench-nodes`.

    python bench/nodes.py                           # 2 and 4 nodes of 2 ranks, links of 1 and 5 Gb/s
    python bench/nodes.py --nodes 2 --gbit 1 --small

For each number of nodes and rate it makes a rig (bench/rig), and runs all systems on the same routing under
one mpirun, in turns. "MB" is what crossed the busiest direction of any link, by the counters of the nodes'
interfaces, headers and acknowledgements included. "Least" is the rows alone, each token once to each node
that it must reach; "of limit" is the time that these need at the link's rate over the time taken (a link
carries 128 KiB beyond its rate after a pause, so tiny operations exceed it). Every system's answer is checked
in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.harness.report import show, table
from bench.harness.samples import RESULTS, options, write_samples
from bench.harness.stats import Stats
from bench.harness.workload import add_shape_arguments, require_equal_blocks
from bench.rig.mpi import mpirun
from bench.rig.namespaces import why_not
from bench.rig.netns import Rig
from bench.rig.node_ranks import Meeting, busiest_bytes
from bench.systems.nodes import BARE, DIRECT, EACH, GLOO, HIERARCHICAL, MPI
from commlib.model import UniformRouting

ITEM_BYTES = 2  # bf16
SMALL = {"nodes": [2], "gbit": [1.0], "tokens": 64, "hidden": 512, "iters": 2, "warmup": 1}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, tokens=1024)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--gbit", type=float, nargs="+", default=[1.0, 5.0], help="Gb/s of a node's link")
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--mtu", type=int, default=9000)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one rig")
    parser.add_argument("--small", action="store_true", help="to see whether it works")
    parser.add_argument(
        "--json", type=Path, help="default: bench/results/local/nodes-cpu.json; none with --small"
    )
    parser.set_defaults(hidden=2048, experts=32)
    if "--small" in sys.argv:
        parser.set_defaults(**SMALL)
    args = parser.parse_args()
    for nodes in args.nodes:
        require_equal_blocks(args.experts, nodes * args.ranks_per_node)
    return args


def measure(args: argparse.Namespace, nodes: int, gbit: float) -> dict[str, Any]:
    """Make a rig, run all systems on it, take it down."""
    with TemporaryDirectory(prefix="commlib-nodes-") as folder, Rig(nodes, gbit, args.mtu) as rig:
        meeting, answer = Path(folder, "meeting"), Path(folder, "answer")
        Meeting.create(meeting, nodes * args.ranks_per_node)
        options = {name: getattr(args, name) for name in ("tokens", "hidden", "experts", "topk", "seed")}
        options |= {"nodes": nodes, "iters": args.iters, "warmup": args.warmup}
        options |= {"meeting": meeting, "answer": answer}
        program = [sys.executable, str(Path(__file__).with_name("nodes_rank.py"))]
        program += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with mpirun(rig, args.ranks_per_node, program) as running:
            code = running.wait(args.timeout)
        if code:
            raise subprocess.CalledProcessError(code, "mpirun")
        return json.loads(answer.read_text()) | {
            "nodes": nodes,
            "gbit": gbit,
            "links_whole_run": [asdict(count) for count in rig.counts()],
            "held_back": [rig.held_back(node.index) for node in rig.nodes],
        }


def row_bytes(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, int]:
    """Bytes of rows on the busiest link: each token once to a node (the least), to a rank, to an expert."""
    return {name: rows * args.hidden * ITEM_BYTES for name, rows in result["busiest_rows"].items()}


def rows_of(result: dict[str, Any], operation: str, least: float) -> Iterator[list[str]]:
    """The table's rows for dispatch or combine."""
    stats = {name: Stats.of(times[operation]) for name, times in result["samples_s"].items()}
    for name in (EACH, GLOO, MPI, DIRECT, HIERARCHICAL, BARE):
        if name in stats:
            median, carried = stats[name].median, busiest_bytes(result["traffic"][name][operation])
            link = result["gbit"] * 1e9 / 8
            yield [
                operation,
                name,
                stats[name].text(unit=1e-3, digits=1),
                f"{carried / 1e6:.2f}",
                f"{carried / least:.3f}",
                f"{carried / link / median:.0%}",
                f"{least / link / median:.0%}",
                f"{stats[EACH].median / median:.2f}x",
            ]


def publish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print one rig's table."""
    bytes_of = row_bytes(args, result)
    facts, nodes = result["machine"], result["nodes"]
    title = (
        f"{nodes} nodes x {args.ranks_per_node} ranks on {facts['cores']} cores ({facts['cpu']}), links of "
        f"{result['gbit']:g} Gb/s; T={args.tokens} H={args.hidden} bf16, top-{args.topk} of {args.experts}, "
        f"median of {args.iters}\nRows on the busiest link: {bytes_of['per_node'] / 1e6:.2f} MB once to each "
        f"node (least), {bytes_of['per_rank'] / 1e6:.2f} to each rank, {bytes_of['per_expert'] / 1e6:.2f} to "
        "each expert"
    )
    columns = ["", "system", "ms (min-max)", "MB", "x least", "link used", "of limit", "speed"]
    sections = [rows_of(result, operation, bytes_of["per_node"]) for operation in ("dispatch", "combine")]
    show(table(title, columns, sections), *(f"{name}: {why}" for name, why in result["skipped"].items()))


def expected_rows(args: argparse.Namespace, nodes: int) -> dict[str, float]:
    """Rows that a token sends on average, its own node included, by the model's closed form."""
    routing = UniformRouting(args.experts, args.topk, nodes * args.ranks_per_node, nodes)
    return {"per_node": routing.unique_nodes, "per_rank": routing.unique_ranks}


def main() -> None:
    args = parse_arguments()
    reason = why_not()
    if reason:
        sys.exit(f"bench/nodes.py: {reason}")
    # It would warn that addresses of a rig have no names.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    results = []
    for nodes in args.nodes:
        for gbit in args.gbit:
            result = measure(args, nodes, gbit) | {"expected_rows": expected_rows(args, nodes)}
            publish(args, result)
            results.append(result)
    path = args.json or (None if args.small else RESULTS / "nodes-cpu.json")
    if path:
        write_samples(path, {"config": options(args), "rigs": results})
        show(f"every sample: {path}")


if __name__ == "__main__":
    main()
