"""The rates that TCP itself reaches on a rig's links: plain sockets between nodes, and nothing else.

    python bench/streams.py --gbit 1 5 --nodes 2 4      # as root: makes rigs (netns.py) and measures them

The figures say whether a rig's links are as fast as asked, and how much of that the machine's cores leave
when all nodes send at once. `nodes.py` compares its systems with the same exchange.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from netns import Node, Rig

PORT = 29512
CHUNK = 1 << 20
CONNECT_SECONDS = 20.0


class Mesh:
    """A connection to every other node.

    Args:
        addresses: of all nodes.
        index: which of them this is.
    """

    def __init__(self, addresses: Sequence[str], index: int) -> None:
        with socket.create_server((addresses[index], PORT)) as server:
            below = {node: _connect(addresses[node], index) for node in range(index)}
            above = [server.accept()[0] for _ in range(index + 1, len(addresses))]
        self._peers = below | {_name(connection): connection for connection in above}
        self._pool = ThreadPoolExecutor(2 * len(self._peers))
        self._source, self._sinks = memoryview(bytes(CHUNK)), {p: bytearray(CHUNK) for p in self._peers}

    def exchange(self, send: dict[int, int], receive: dict[int, int]) -> None:
        """Send these numbers of bytes to the nodes, and receive these, all at the same time."""
        work = [self._pool.submit(self._send, peer, n) for peer, n in send.items() if n]
        work += [self._pool.submit(self._receive, peer, n) for peer, n in receive.items() if n]
        for part in work:
            part.result()

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._pool.shutdown()

    def _send(self, peer: int, left: int) -> None:
        while left:
            left -= self._peers[peer].send(self._source[:left])

    def _receive(self, peer: int, left: int) -> None:
        sink = memoryview(self._sinks[peer])
        while left:
            got = self._peers[peer].recv_into(sink[:left])
            if not got:
                raise ConnectionError(f"node {peer} closed its connection, {left} bytes early")
            left -= got


def _connect(address: str, index: int) -> socket.socket:
    """Connect to a node that may not listen yet, and send this node's index."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            connection = socket.create_connection((address, PORT), timeout=CONNECT_SECONDS)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    connection.settimeout(None)
    connection.sendall(bytes([index]))
    return connection


def _name(connection: socket.socket) -> int:
    return connection.recv(1)[0]


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
