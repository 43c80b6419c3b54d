"""Nodes on one machine whose links are limited for real: network namespaces, a bridge, `tc tbf`.

Needs root, iproute2 and util-linux. Each node is a namespace with one interface, ``eth0``; all are joined by
a bridge in a namespace of its own, so that nothing of the host's network is touched and no address can clash.
A node's link is limited in both directions: what it sends, at its ``eth0``; what it receives, at the bridge's
port towards it.

Such nodes share everything but the network: memory, /proc, process ids, files. Nothing but the environment
(:meth:`Node.environment`) keeps UCX from going through shared memory between them.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rig.namespaces import RigError, call, own_prefix, remove, signals_wait, why_not

INTERFACE = "eth0"  # of every node
MASTER_PORT = 29511  # of the rendezvous at node 0; a rig's ports are its own, so any will do
_BRIDGE = "bridge0"
_FORWARDING, _DISABLED = "3", "0"  # states of a bridge's port

# A bucket must hold one send of 64 KiB, as TCP hands it to the interface. A link also carries this much
# beyond its rate after a pause. 64 KiB reached 4.4 of 5 Gb/s here, 128 KiB 4.9.
_BUCKET = 128 * 1024
# How much a full link's queue holds, in seconds of its rate.
_QUEUE_SECONDS = 0.032

_SETTINGS = {
    "ipv6/conf/all/disable_ipv6": "1",  # its neighbours' chatter would be counted
    # A namespace may choose among those that its host allows everyone: reno and the host's default. Where
    # that is bbr, 4.6 of 5 Gb/s were reached, with reno 4.9.
    "ipv4/tcp_congestion_control": "reno",
    "ipv4/tcp_slow_start_after_idle": "0",  # operations come in bursts
    "ipv4/tcp_no_metrics_save": "1",  # no connection learns from an earlier one
}


@dataclass(frozen=True)
class LinkCount:
    """Bytes on one node's link, by the counters of the interfaces at its two ends.

    They count packets as TCP hands them over, up to 64 KiB with one header: 440.4 MB of payload were counted
    as 440.9 MB, and as 443.7 MB where each packet of 9000 bytes was handed over by itself.
    """

    sent: int  # by the node
    received: int  # by the node
    switch_sent: int  # by the bridge towards the node
    switch_received: int  # by the bridge from the node

    def __sub__(self, other: LinkCount) -> LinkCount:
        return LinkCount(
            self.sent - other.sent,
            self.received - other.received,
            self.switch_sent - other.switch_sent,
            self.switch_received - other.switch_received,
        )


def own_link() -> tuple[int, int]:
    """Bytes sent and received so far by the node that this process runs on."""
    statistics = Path("/sys/class/net", INTERFACE, "statistics")
    return tuple(int((statistics / name).read_text()) for name in ("tx_bytes", "rx_bytes"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Node:
    """One node of a rig."""

    index: int
    nodes: int
    namespace: str

    @property
    def address(self) -> str:
        return _address(self.index)

    @property
    def port(self) -> str:
        """The bridge's interface towards this node, in the switch's namespace."""
        return f"port{self.index}"

    def command(self, argv: Sequence[str]) -> list[str]:
        """A command that runs ``argv`` on this node, under its own host name: ``node0``, ``node1`` ..."""
        rename = 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"'
        inside = ["unshare", "--uts", "sh", "-c", rename, f"node{self.index}", *argv]
        return ["ip", "netns", "exec", self.namespace, *inside]

    def environment(self) -> dict[str, str]:
        """With it torchrun, gloo and UCX on this node find the others, and only over the link."""
        return {
            "COMMLIB_NODE": str(self.index),
            "COMMLIB_NODES": str(self.nodes),
            "PET_NNODES": str(self.nodes),  # torchrun's --nnodes, --node-rank ...
            "PET_NODE_RANK": str(self.index),
            "PET_MASTER_ADDR": _address(0),
            "PET_MASTER_PORT": str(MASTER_PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "UCX_NET_DEVICES": INTERFACE,
            "UCX_TLS": "tcp,self",  # nodes share memory, and UCX would find that out
        }


class Rig:
    """Nodes with limited links, from ``__enter__`` to ``__exit__``; use it in a ``with`` statement.

    The end takes everything down, even after an exception, Ctrl-C, SIGTERM or SIGHUP (while a rig is open in
    the main thread, the latter two become SystemExit). Processes that still run on a node are ended.

    Args:
        nodes: 2 to 250.
        gbit: rate of each node's link in Gb/s (1e9 bits), each direction.
        mtu: bytes of a packet.

    Raises:
        RigError: no rig can be made here, or a command failed.
    """

    _serial = itertools.count()

    def __init__(self, nodes: int, gbit: float, mtu: int = 9000) -> None:
        if not 2 <= nodes <= 250:
            raise ValueError(f"nodes must be 2 to 250, got {nodes}")
        self.gbit, self.mtu = gbit, mtu
        prefix = own_prefix(next(Rig._serial))
        self._switch = f"{prefix}switch"
        self.nodes = [Node(i, nodes, f"{prefix}n{i}") for i in range(nodes)]
        self._children: list[subprocess.Popen[Any]] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Rig:
        reason = why_not()
        if reason:
            raise RigError(reason)
        self._catch_signals()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down. Twice is fine."""
        with signals_wait():
            remove([self._switch, *(node.namespace for node in self.nodes)])
            for child in self._children:
                child.wait()
            self._children.clear()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()

    def popen(
        self, node: int, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on a node; ``env`` is added to ours and to :meth:`Node.environment`."""
        where = self.nodes[node]
        environment = {**os.environ, **where.environment(), **(env or {})}
        child = subprocess.Popen(where.command(argv), env=environment, **options)
        self._children.append(child)
        return child

    def run(self, argv: Sequence[str], *, timeout: float | None = None, **options: Any) -> list[int]:
        """Run a command on every node at once; return its exit codes by node.

        Raises:
            subprocess.TimeoutExpired: one still runs after ``timeout`` seconds.
        """
        children = [self.popen(node.index, argv, **options) for node in self.nodes]
        deadline = None if timeout is None else time.monotonic() + timeout
        return [child.wait(deadline and max(0.0, deadline - time.monotonic())) for child in children]

    def counts(self) -> list[LinkCount]:
        """Bytes on each node's link so far."""
        ports = _bytes_of(self._switch)
        ends = [(_bytes_of(node.namespace)[INTERFACE], ports[node.port]) for node in self.nodes]
        return [LinkCount(*inner, *outer) for inner, outer in ends]

    def held_back(self, node: int) -> int:
        """How often the limit has held packets of this node back, both directions together."""
        where = self.nodes[node]
        ends = ((where.namespace, INTERFACE), (self._switch, where.port))
        shown = [call("tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", device) for name, device in ends]
        return sum(qdisc["overlimits"] for text in shown for qdisc in json.loads(text))

    def cut(self, node: int) -> None:
        """Let nothing through a node's link, as when a switch's port is disabled.

        The node notices nothing, and its connections live: TCP sends again, less and less often, until the
        link is back or it gives up (minutes). Packets that the bridge has queued for the node still arrive.
        """
        self._set_port(node, _DISABLED)

    def restore(self, node: int) -> None:
        """End a cut."""
        self._set_port(node, _FORWARDING)

    @contextmanager
    def link_cut(self, node: int) -> Iterator[None]:
        """A cut that lasts as long as the ``with`` block."""
        self.cut(node)
        try:
            yield
        finally:
            self.restore(node)

    def set_rate(self, node: int, gbit: float) -> None:
        """Change the rate of one node's link, both directions, also while data flows."""
        where = self.nodes[node]
        _limit("change", where.namespace, INTERFACE, gbit)
        _limit("change", self._switch, where.port, gbit)

    def _build(self) -> None:
        switch = ["ip", "-n", self._switch]
        call("ip", "netns", "add", self._switch)
        _settle(self._switch)
        call(*switch, "link", "add", _BRIDGE, "mtu", str(self.mtu), "type", "bridge", "mcast_snooping", "0")
        call(*switch, "link", "set", _BRIDGE, "up")
        for node in self.nodes:
            self._add(node)

    def _add(self, node: Node) -> None:
        inside, mtu = ["ip", "-n", node.namespace], ["mtu", str(self.mtu)]
        call("ip", "netns", "add", node.namespace)
        _settle(node.namespace)
        call(*inside, "link", "set", "lo", "up")
        end = ["peer", "name", node.port, *mtu, "netns", self._switch]
        call(*inside, "link", "add", INTERFACE, "address", _hardware(node.index), *mtu, "type", "veth", *end)
        call(*inside, "address", "add", f"{node.address}/24", "dev", INTERFACE)
        call("ip", "-n", self._switch, "link", "set", node.port, "master", _BRIDGE, "up")
        call(*inside, "link", "set", INTERFACE, "up")
        for other in self.nodes:  # asking for an address would be counted, and fail during a cut
            if other is not node:
                known = [other.address, "lladdr", _hardware(other.index), "nud", "permanent"]
                call(*inside, "neighbour", "add", *known, "dev", INTERFACE)
        forward = [_hardware(node.index), "dev", node.port, "master", "static"]
        call("bridge", "-n", self._switch, "fdb", "add", *forward)
        _limit("add", node.namespace, INTERFACE, self.gbit)
        _limit("add", self._switch, node.port, self.gbit)

    def _set_port(self, node: int, state: str) -> None:
        call("bridge", "-n", self._switch, "link", "set", "dev", self.nodes[node].port, "state", state)

    def _catch_signals(self) -> None:
        def leave(number: int, _: Any) -> None:
            sys.exit(128 + number)

        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread handles signals
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self._handlers[number] = signal.signal(number, leave)


def _address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def _hardware(node: int) -> str:
    return f"02:00:00:00:00:{node + 1:02x}"


def _settle(namespace: str) -> None:
    """Write the settings; one that the kernel lacks (IPv6) does not matter."""
    lines = [
        f"! test -e /proc/sys/net/{name} || echo {value} >/proc/sys/net/{name}"
        for name, value in _SETTINGS.items()
    ]
    call("ip", "netns", "exec", namespace, "sh", "-e", "-c", "\n".join(lines))


def _limit(verb: str, namespace: str, device: str, gbit: float) -> None:
    """Limit what leaves an interface."""
    bits = round(gbit * 1e9)
    queue = max(round(bits / 8 * _QUEUE_SECONDS), 2 * _BUCKET)
    rate = ["rate", f"{bits}bit", "burst", str(_BUCKET), "limit", str(queue)]
    try:
        call("tc", "-n", namespace, "qdisc", verb, "dev", device, "root", "tbf", *rate)
    except RigError as error:
        raise RigError(f"{error} (does the kernel have sch_tbf? modprobe sch_tbf)") from error


def _bytes_of(namespace: str) -> dict[str, tuple[int, int]]:
    """Bytes sent and received, by interface."""
    links = json.loads(call("ip", "-n", namespace, "-s", "-j", "link", "show"))
    return {
        link["ifname"]: (link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]) for link in links
    }
