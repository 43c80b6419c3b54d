"""Measure dispatch and combine over commlib, gloo and MPI, on the same routing, in one run.

    mpirun -n 4 python bench/dispatch_combine.py                # cpu_paths.py: what is compared
    mpirun -n 4 python bench/dispatch_combine.py --tokens 8192 --hidden 2048   # of other sizes
    torchrun --nproc-per-node 4 bench/dispatch_combine.py      # without the MPI rows
    mpirun -n 8 python bench/dispatch_combine.py --preset h800  # on links of that kind, slowed down
    mpirun -n 8 python bench/dispatch_combine.py --device cuda  # a GPU for each rank: gpu_comparison.py

The systems take turns, iteration by iteration and in changing order, so that whatever else the
machine does, and whatever is left in the caches, affects all of them. A time goes from the first
rank's begin to the last rank's end. Every system's answer is checked in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import cpu_paths, gpu_comparison, limited_link
from bench.cpu_paths import DTYPES
from bench.harness.report import NO_GPU
from bench.harness.workload import Shape, add_shape_arguments
from bench.limited_link import add_link_arguments
from bench.systems.cpus import CHOICES
from commlib import cuda


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, tokens=cpu_paths.SIZES)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--iters", type=int, help="default: by size; on limited links 7")
    parser.add_argument("--warmup", type=int, default=2)
    on_gpus = ",".join(gpu_comparison.CHOICES)
    parser.add_argument("--only", help=f"of {','.join(CHOICES)}; with --device cuda of {on_gpus}")
    parser.add_argument("--num-sms", type=int, help="commlib's threads, or SMs; default: its own choice")
    parser.add_argument("--json", type=Path, help="default: bench/results/local/, named by ranks")
    add_link_arguments(parser)
    choices: Iterable[str] = CHOICES
    known, _ = parser.parse_known_args()
    if limits_links(known):
        parser.set_defaults(tokens=[1024], iters=7)
    elif compares_gpus(known):
        parser.set_defaults(**gpu_comparison.DEFAULTS)
        choices = gpu_comparison.CHOICES
    args = parser.parse_args()
    args.only = set(choices if args.only is None else args.only.split(","))
    if not args.only <= set(choices):
        parser.error(f"--only takes {', '.join(choices)}")
    iters = 1 if args.iters is None else args.iters
    if min(*args.tokens, args.hidden, args.topk, iters) < 1 or args.topk > args.experts:
        parser.error("sizes must be at least 1, and --topk at most --experts")
    if len(args.tokens) > 1 and (limits_links(args) or compares_gpus(args)):
        parser.error("--tokens takes several sizes only on CPUs, without a limited link")
    if compares_gpus(args) and args.device != "cuda":
        parser.error("--device cuda: each rank takes a GPU of its own; bench/gpu.py compares on one")
    if args.device != "cpu" and not compares_gpus(args) and not cuda.is_available():
        print(f"--device {args.device} needs a GPU: {cuda.why_not()}", file=sys.stderr)
        sys.exit(NO_GPU)
    return args


def limits_links(args: argparse.Namespace) -> bool:
    return bool(args.preset or args.link_gbps)


def compares_gpus(args: argparse.Namespace) -> bool:
    """Whether the ranks have a GPU each, rather than a limited link."""
    return args.device != "cpu" and not limits_links(args)


def main() -> None:
    args = parse_arguments()
    tokens = max(args.tokens)
    shape = Shape(tokens, args.hidden, args.experts, args.topk, DTYPES[args.dtype], args.seed)
    if not limits_links(args) and not compares_gpus(args):
        cpu_paths.main(shape, args)
        return
    args.tokens = tokens  # there is one
    if limits_links(args):
        limited_link.main(shape, args)
    else:
        gpu_comparison.main(shape, args)


if __name__ == "__main__":
    main()
