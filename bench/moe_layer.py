"""Measure one MoE layer, forward and backward: over commlib, and over an all-to-all on gloo, MPI or NCCL.

    mpirun -n 4 python bench/moe_layer.py
    torchrun --nproc-per-node 4 bench/moe_layer.py                 # without the MPI row
    mpirun -n 8 python bench/moe_layer.py --device cuda            # a GPU for each rank; NCCL
    python bench/moe_layer.py --link-gbps 0.125 --nodes 2          # as root: nodes whose links are limited

The all-to-all layer (bench/systems/all_to_all_layer.py) is usual: a row for each of a token's experts.
commlib sends a row once to each rank. All systems have the same router, the same experts and the same tokens,
and take turns in changing order. Before anything is timed, each system's output and all its gradients are
compared with the unsharded layer's; a wrong one ends the run.

"MB sent" is the rows and counts that the busiest rank sends to others. With `--link-gbps` nodes are network
namespaces (bench/rig/netns.py), whose links limit all systems alike, and "MB on link" is what the busiest
direction of any node's link carried, by its interface's counters. "Peak" is of a rank's memory, counted from
before the layer's communication was set up; weights and tokens are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.harness.launch import Launch
from bench.harness.machine import gpu, host
from bench.harness.ranks import Case, HostRanks, interleaved
from bench.harness.report import NO_GPU, show, table
from bench.harness.samples import RESULTS, options, write_samples
from bench.harness.seats import NoSeat, take_gpu
from bench.harness.stats import Stats
from bench.harness.workload import Shape, add_shape_arguments, require_equal_blocks
from bench.rig.mpi import mpirun
from bench.rig.namespaces import why_not
from bench.rig.netns import Rig
from bench.rig.node_ranks import Meeting, NodesLaunch, Traffic, busiest_bytes
from bench.systems.layers import CHOICES, COMMLIB, Place, Problem, Systems
from commlib import cuda
from commlib.startup.launcher import find_launch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GPU_DEFAULTS = dict(tokens=4096, hidden=4096, ffn_hidden=1536, experts=64, topk=8, dtype="bf16", iters=12)
RANK_OPTIONS = ("tokens", "hidden", "ffn_hidden", "experts", "topk", "seed", "dtype", "iters", "warmup")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, tokens=512)
    parser.add_argument("--ffn-hidden", type=int, default=256, help="of the experts")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--iters", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--only", help=f"of {','.join(CHOICES)}; default: all that can run here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU for each rank")
    parser.add_argument("--json", type=Path, help="default: bench/results/local/, named by ranks")
    limited = parser.add_argument_group("nodes whose links are limited (as root, without mpirun)")
    limited.add_argument("--link-gbps", type=float, help="GB/s of a node's link, each direction")
    limited.add_argument("--nodes", type=int, default=2)
    limited.add_argument("--ranks-per-node", type=int, default=2)
    limited.add_argument("--mtu", type=int, default=9000)
    limited.add_argument("--timeout", type=float, default=300, help="seconds")
    for name in ("--meeting", "--answer"):  # for the ranks that such a run starts
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(hidden=1024, experts=16, topk=4)
    if parser.parse_known_args(argv)[0].device == "cuda":
        parser.set_defaults(**GPU_DEFAULTS)
    args = parser.parse_args(argv)
    args.only = set(CHOICES if args.only is None else args.only.split(","))
    if not args.only <= set(CHOICES):
        parser.error(f"--only takes {', '.join(CHOICES)}")
    sizes = (
        args.tokens,
        args.hidden,
        args.ffn_hidden,
        args.topk,
        args.iters,
        args.nodes,
        args.ranks_per_node,
    )
    if min(sizes) < 1 or args.topk > args.experts:
        parser.error("sizes must be at least 1, and --topk at most --experts")
    if args.link_gbps is not None and (args.device != "cpu" or not args.link_gbps > 0):
        parser.error("--link-gbps takes a number above 0, on the CPU")
    return args


class NodeRanks(HostRanks):
    """Processes on nodes of a rig.

    Attributes:
        crossed: bytes that each run of an operation sent and received over the link of this rank's node.
    """

    def __init__(self, launch: NodesLaunch) -> None:
        super().__init__(launch)
        self._noted = launch.noted
        self.crossed: dict[Callable[[], Any], list[Traffic]] = defaultdict(list)

    def timed(self, operation: Callable[[], Any]) -> float:
        seconds = super().timed(operation)
        self.crossed[operation].append(self._noted[-1])
        return seconds


class GpuRanks(HostRanks):
    """Processes with a GPU each: an operation ends when the rank's GPU has done it."""

    def __init__(self, launch: Launch, device: torch.device, hosts: int) -> None:
        self._launch = launch
        self.rank, self.size, self.group, self.device = launch.rank, launch.size, launch.ranks, str(device)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        self._facts = host() | gpu(device.index) | {"ranks": launch.size, "hosts": hosts, "nccl": nccl}

    def timed(self, operation: Callable[[], Any]) -> float:
        def until_done() -> None:
            operation()
            torch.cuda.synchronize()

        return super().timed(until_done)


def measure(ranks: HostRanks, place: Place, args: argparse.Namespace) -> dict[str, Any]:
    """Called by all ranks.

    Raises:
        WrongResults: a system differs from the unsharded layer; nothing was timed.
    """
    launch = place.launch
    shape = Shape(args.tokens, args.hidden, args.experts, args.topk, DTYPES[args.dtype], args.seed)
    problem = Problem(place, shape, args.ffn_hidden)
    with Systems(problem, args.only) as systems:
        ready = systems.ready()
        cases = {system.name: Case(system.run) for system in ready}
        for _ in range(args.warmup):
            for case in cases.values():
                case.timed(ranks)
        samples = interleaved(ranks, cases, args.iters, "layer")
        result = {
            "samples_s": samples,
            "sent_bytes": {s.name: launch.gather(s.sent_bytes) for s in ready},
            "peak_bytes": {s.name: launch.gather(s.peak_bytes) for s in ready},
            "skipped": systems.skipped,
            "machine": ranks.facts(),
        }
    if isinstance(ranks, NodeRanks) and isinstance(launch, NodesLaunch):
        # By node: bytes sent and received, iteration by iteration.
        traffic = {name: ranks.crossed[case.operation][args.warmup :] for name, case in cases.items()}
        leaders = launch.gather(traffic)[:: launch.ranks_per_node]
        result["traffic"] = {name: [leader[name] for leader in leaders] for name in cases}
    return result


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows."""
    stats = {name: Stats.of(seconds) for name, seconds in result["samples_s"].items()}
    rows = []
    for name, taken in stats.items():
        ratios = [""]
        if COMMLIB in stats and name != COMMLIB:
            pairs = zip(result["samples_s"][name], result["samples_s"][COMMLIB], strict=True)
            ratios = [Stats.of([theirs / ours for theirs, ours in pairs]).text(unit=1, digits=2)]
        peaks = [peak for peak in result["peak_bytes"][name] if peak is not None]
        peak = f"{max(peaks) / 1e6:.0f}" if peaks else "?"
        rows.append([name, taken.text(), *ratios, f"{moved_bytes(result, name) / 1e6:.2f}", peak])
    return rows + [[name, why] for name, why in result["skipped"].items()]


def moved_bytes(result: dict[str, Any], name: str) -> float:
    """Sent by the busiest rank, or over the busiest link where links were counted."""
    return busiest_bytes(result["traffic"][name]) if "traffic" in result else max(result["sent_bytes"][name])


def publish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the table and write every sample as JSON."""
    facts = result["machine"]
    on = f"a {facts['gpu']} each" if "gpu" in facts else f"{facts['cores']} cores ({facts['cpu']})"
    links = ""
    if args.link_gbps is not None:
        links = f", {args.nodes} nodes with links of {args.link_gbps:g} GB/s"
    title = (
        f"MoE layer, forward and backward: {facts['ranks']} ranks on {on}{links}; T={args.tokens} "
        f"H={args.hidden} F={args.ffn_hidden} {args.dtype}, top-{args.topk} of {args.experts}, "
        f"median of {args.iters}"
    )
    moved = "MB on link" if "traffic" in result else "MB sent"
    columns = ["", "ms (min-max)", "x commlib (min-max)", moved, "peak MB"]
    kind = "gpu" if "gpu" in facts else "cpu" if args.link_gbps is None else f"{args.nodes}-nodes"
    path = args.json or RESULTS / f"moe_layer-{kind}-r{facts['ranks']}.json"
    write_samples(path, {"config": options(args)} | result)
    show(table(title, columns, [rows_of(result)]), f"every sample: {path}")


def main_limited(args: argparse.Namespace) -> None:
    """Make a rig, run the ranks on it, show their findings."""
    if find_launch() is not None:
        sys.exit("bench/moe_layer.py --link-gbps starts its ranks itself: run it without mpirun or torchrun")
    if reason := why_not():
        sys.exit(f"bench/moe_layer.py --link-gbps: {reason}")
    require_equal_blocks(args.experts, args.nodes * args.ranks_per_node)
    # It would warn that addresses of a rig have no names.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with (
        TemporaryDirectory(prefix="commlib-layer-") as folder,
        Rig(args.nodes, args.link_gbps * 8, args.mtu) as rig,
    ):
        meeting, answer = Path(folder, "meeting"), Path(folder, "answer")
        Meeting.create(meeting, args.nodes * args.ranks_per_node)
        options = {name: getattr(args, name) for name in (*RANK_OPTIONS, "nodes")}
        options |= {"only": ",".join(sorted(args.only)), "meeting": meeting, "answer": answer}
        words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
        program = [sys.executable, __file__, *(word for pair in words for word in pair)]
        with mpirun(rig, args.ranks_per_node, program) as running:
            code = running.wait(args.timeout)
        if code:
            raise subprocess.CalledProcessError(code, "mpirun")
        publish(args, json.loads(answer.read_text()))


def main_on_node(args: argparse.Namespace) -> None:
    """One rank of such a run."""
    torch.set_num_threads(1)
    with Launch.session() as joined:
        meeting = Meeting(args.meeting, joined.rank, joined.size)
        launch = NodesLaunch(**vars(joined), nodes=args.nodes, meeting=meeting)
        place = Place(
            launch, torch.device("cpu"), network={"ranks_per_node": launch.ranks_per_node, "routing": "auto"}
        )
        result = measure(NodeRanks(launch), place, args)
        if launch.rank == 0:
            args.answer.write_text(json.dumps(result))


def main_on_gpus(args: argparse.Namespace) -> None:
    with Launch.session() as launch:
        try:
            device, hosts = take_gpu(launch)
        except NoSeat as error:
            if launch.rank == 0:
                print(f"bench/moe_layer.py --device cuda: {error}", file=sys.stderr)
            sys.exit(NO_GPU)
        require_equal_blocks(args.experts, launch.size)
        result = measure(GpuRanks(launch, device, hosts), Place(launch, device), args)
        if launch.rank == 0:
            publish(args, result)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.meeting is not None:
        main_on_node(args)
    elif args.link_gbps is not None:
        main_limited(args)
    elif args.device == "cuda":
        if not cuda.is_available():
            print(f"bench/moe_layer.py --device cuda needs a GPU: {cuda.why_not()}", file=sys.stderr)
            sys.exit(NO_GPU)
        main_on_gpus(args)
    else:
        with Launch.session() as launch:
            require_equal_blocks(args.experts, launch.size)
            launch.share_cores()
            result = measure(HostRanks(launch), Place(launch, torch.device("cpu")), args)
            if launch.rank == 0:
                publish(args, result)


if __name__ == "__main__":
    main()
