"""One rank of `nodes.py`, which starts it under mpirun on every node of a rig."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench.harness.launch import Launch
from bench.harness.machine import machine
from bench.harness.turns import measure_throughput
from bench.harness.workload import Job, Shape, add_shape_arguments
from bench.rig.node_ranks import Meeting, NodesLaunch
from bench.systems.nodes import Counted, Rows, open_systems


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape_arguments(parser, tokens=1024)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--iters", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--meeting", type=Path, required=True, help="a file, by Meeting.create")
    parser.add_argument("--answer", type=Path, required=True, help="where rank 0 writes what was measured")
    return parser.parse_args()


def run(launch: NodesLaunch, shape: Shape, iters: int, warmup: int) -> dict[str, Any]:
    job = Job.build(shape, launch.rank, launch.size)
    rows = Rows.of(launch, job, shape.experts // launch.size)
    with open_systems(launch, shape, job, rows) as (systems, skipped):
        samples, wrong = measure_throughput(launch, job, systems, iters, warmup)
        traffic = {system.name: _by_node(launch, system, warmup) for system in systems}
    return {
        "samples_s": samples,
        "traffic": traffic,
        "skipped": skipped,
        "wrong": list(chain(*launch.gather(wrong))),
        "rows": {name: matrix.tolist() for name, matrix in vars(rows).items()},
        "busiest_rows": {name: rows.busiest(matrix) for name, matrix in vars(rows).items()},
        "machine": machine(launch),
    }


def _by_node(launch: NodesLaunch, system: Counted, warmup: int) -> dict[str, list[Any]]:
    """For each operation and node: bytes sent and received, iteration by iteration."""
    measured = {operation: traffic[warmup:] for operation, traffic in system.traffic.items()}
    leaders = launch.gather(measured)[:: launch.ranks_per_node]
    return {operation: [leader[operation] for leader in leaders] for operation in measured}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk, torch.bfloat16, args.seed)
    with Launch.session() as joined:
        meeting = Meeting(args.meeting, joined.rank, joined.size)
        launch = NodesLaunch(**vars(joined), nodes=args.nodes, meeting=meeting)
        result = run(launch, shape, args.iters, args.warmup)
        if launch.rank == 0:
            args.answer.write_text(json.dumps(result))
        if result["wrong"]:
            sys.exit("\n".join(["WRONG RESULTS", *result["wrong"]]) if launch.rank == 0 else 1)


if __name__ == "__main__":
    main()
