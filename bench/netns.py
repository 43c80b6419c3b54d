"""Make nodes on one machine whose links are limited for real: network namespaces, a bridge, `tc tbf`.

    python bench/netns.py run --nodes 2 --gbit 1 -- torchrun --nproc-per-node 2 program.py
    python bench/netns.py list            # existing rigs, and whether the program that made them lives
    python bench/netns.py clean           # remove those of programs that died without a word (SIGKILL)

What they are, and what they share: bench/rig/netns.py. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import argparse
import sys

from bench.rig.namespaces import clean, existing, why_not
from bench.rig.netns import Rig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="make nodes, run a command on each, take them down")
    run.add_argument("--nodes", type=int, default=2)
    run.add_argument("--gbit", type=float, default=1.0, help="Gb/s of each link, each direction")
    run.add_argument("--mtu", type=int, default=9000)
    run.add_argument("--timeout", type=float, help="seconds; default: as long as it takes")
    run.add_argument("command", nargs="+", help="after --; torchrun and gloo find their way by themselves")
    verbs.add_parser("list", help="rigs there are")
    verbs.add_parser("clean", help="remove rigs of dead programs")
    args = parser.parse_args()
    reason = why_not()
    if reason:
        sys.exit(reason)
    if args.verb == "list":
        print(*(f"{name}  {'running' if alive else 'dead'}" for name, alive in existing().items()), sep="\n")
    elif args.verb == "clean":
        print(*(f"removed {name}" for name in clean()), sep="\n")
    else:
        with Rig(args.nodes, args.gbit, args.mtu) as rig:
            codes = rig.run(args.command, timeout=args.timeout)
        sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()
