"""The rates that TCP itself reaches on a rig's links: plain sockets between nodes, and nothing else.

    python bench/streams.py --gbit 1 5 --nodes 2 4      # as root: makes rigs (bench/rig) and measures them

The figures say whether a rig's links are as fast as asked, and how much of that the machine's cores leave
when all nodes send at once. `nodes.py` compares its systems with the same exchange.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.rig.netns import Node, Rig
from bench.systems.tcp import Mesh


def measure(nodes: int, gbit: float, megabytes: int, one_way: bool) -> tuple[float, int]:
    """Seconds that the slowest node took, and how often a limit held packets back."""
    with Rig(nodes, gbit) as rig:
        arguments = [str(megabytes), *(["--one-way"] if one_way else [])]
        program = [sys.executable, str(Path(__file__).resolve()), "--megabytes", *arguments]
        options = {"stdout": -1, "text": True}
        children = [
            rig.popen(n.index, [*program, "--node", str(n.index), str(nodes)], **options) for n in rig.nodes
        ]
        answers = [child.communicate(timeout=120)[0] for child in children]
        return max(float(answer) for answer in answers), sum(rig.held_back(n.index) for n in rig.nodes)


def _on_node(index: int, nodes: int, size: int, one_way: bool) -> None:
    """Exchange once to open the connections' windows, then measure: prints seconds of one exchange."""
    mesh = Mesh([Node(i, nodes, "").address for i in range(nodes)], index)
    others = [node for node in range(nodes) if node != index]
    sends = {node: size for node in others if not one_way or index == 0}
    gets = {node: size for node in others if not one_way or node == 0}
    every = dict.fromkeys(others, 1)
    for _ in range(2):
        mesh.exchange(every, every)  # then all have come
        begin = time.monotonic()
        mesh.exchange(sends, gets)
        seconds = time.monotonic() - begin
    print(seconds)
    mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--gbit", type=float, nargs="+", default=[1, 5])
    parser.add_argument("--megabytes", type=int, default=100, help="that each node sends, over all others")
    parser.add_argument("--one-way", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--node", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.node:
        index, nodes = args.node
        return _on_node(index, nodes, args.megabytes * 10**6 // (nodes - 1), args.one_way)
    for nodes in args.nodes:
        for gbit in args.gbit:
            for one_way in (True, False):
                seconds, held = measure(nodes, gbit, args.megabytes, one_way)
                reached = args.megabytes * 8e-3 / seconds
                who = "node 0 to all others" if one_way else "all to all"
                print(
                    f"{nodes} nodes, {gbit:g} Gb/s, {who}: {reached:.3f} Gb/s per link "
                    f"({reached / gbit:.0%}), held back {held} times"
                )


if __name__ == "__main__":
    main()
