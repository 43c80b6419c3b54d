"""Plain sockets between a rig's nodes: what TCP itself allows."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

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
