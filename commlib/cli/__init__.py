"""The ``commlib`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commlib.devices import cuda
from commlib.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="commlib", description="Tools beside the library.")
    parser.add_argument("--version", action=_Version, help="of commlib, and what this build can use here")
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser(
        "bench",
        help="measure this machine",
        description="Measure what commlib.model needs to know of this machine (docs/model.md), and write it "
        "where it is found again. In-process ranks by default; under mpirun or torchrun, their ranks.",
    )
    bench.add_argument("--calibrate", action="store_true", required=True, help="measure and write the file")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    bench.add_argument("--out", type=Path, help="default: ~/.config/commlib/, named by the device")
    bench.add_argument("--ranks", type=int, default=4, help="in-process ranks, default 4")
    bench.add_argument("--tokens", type=int, help="default: 512 on the CPU, 4096 on a GPU")
    bench.add_argument("--hidden", type=int, default=7168)
    bench.add_argument("--topk", type=int, default=8)
    bench.add_argument("--experts", type=int, default=64)
    bench.add_argument("--num-sms", type=int, nargs="+", help="numbers of SMs or threads to try")
    bench.add_argument("--iters", type=int, default=7)
    bench.add_argument("--copy-mib", type=int, help="size of the plain copy; default: 256, on a GPU 1024")
    bench.add_argument("--matmul", type=int, help="size of the matrix product; default: 1024, on a GPU 8192")
    topo = commands.add_parser(
        "topo",
        help="which ranks share a node, and whether UCX is there",
        description="Start it as the ranks are to be started, under mpirun or torchrun.",
    )
    topo.add_argument("--ranks-per-node", type=int, help="default: COMMLIB_NODE_SIZE, or what is found out")
    args = parser.parse_args(argv)
    return _topo(parser, args) if args.command == "topo" else _bench(parser, args)


class _Version(argparse.Action):
    """Looks for a GPU only when asked for the version."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"commlib {__version__}, CUDA backend: {cuda.why_not() or 'ready'}")
        parser.exit()


def _topo(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from commlib.cli.topo import topo  # only this command needs it

    try:
        return 0 if topo(args.ranks_per_node) else 1
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"commlib topo: {error}\n")


def _bench(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from commlib.cli.calibrate import Plan, calibrate  # only this command needs them

    try:
        calibrate(Plan.of(args), args.out)
    except (ValueError, TypeError, RuntimeError) as error:
        parser.exit(1, f"commlib bench: {error}\n")
    return 0
