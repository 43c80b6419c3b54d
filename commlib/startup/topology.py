"""Which ranks share a node, and how rows go from node to node."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from commlib._core import Placement
from commlib.errors import ConfigMismatch
from commlib.model.routing import missed

RoutingMode = Literal["auto", "direct", "hierarchical"]
ROUTINGS = get_args(RoutingMode)


# Mapped memory moves rows at least this many times as fast as the network: NVLink 450 GB/s beside 50 GB/s, or
# memory beside TCP. docs/nodes.md, "Which routing".
_NEAR_BY_FAR = 4.0


@dataclass(frozen=True)
class Topology:
    """Ranks and their nodes.

    Attributes:
        node_of: for each rank, the number of its node; nodes are numbered by their lowest rank.
        hosts: for each node, its name.
    """

    node_of: tuple[int, ...]
    hosts: tuple[str, ...]

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of each node, ascending."""
        ranks: list[list[int]] = [[] for _ in self.hosts]
        for rank, node in enumerate(self.node_of):
            ranks[node].append(rank)
        return ranks

    def near(self, rank: int) -> list[int]:
        """The ranks of a rank's node, itself among them."""
        return self.nodes[self.node_of[rank]]

    def gateway(self, source: int, node: int) -> int:
        """The rank of ``node`` that passes on what ``source``, of another node, sends there in two hops."""
        nodes = self.nodes
        place = nodes[self.node_of[source]].index(source)
        return nodes[node][place % len(nodes[node])]

    def far_rows(self, experts: int, topk: int) -> tuple[float, float]:
        """Rows expected to cross the network if each rank has one token and routing is uniform.

        Returns:
            Sent directly, one for each (token, rank); in two hops, one for each (token, node).
        """
        size = len(self.node_of)
        placement = Placement(experts, size)
        owned = [len(placement.experts_of(r)) for r in range(size)]
        nodes = self.nodes
        direct = sum(
            (1 - missed(experts, topk, owned[r])) * (size - len(nodes[self.node_of[r]])) for r in range(size)
        )
        hops = sum((1 - missed(experts, topk, sum(owned[r] for r in n))) * (size - len(n)) for n in nodes)
        return direct, hops

    def choose(self, routing: str, experts: int, topk: int) -> str:
        """What ``routing="auto"`` stands for; the others stand for themselves.

        Two hops, if the rows that they save on the network would take longer there than all rows take on
        their second hop, which is through mapped memory.
        """
        if routing != "auto":
            return routing
        direct, hops = self.far_rows(experts, topk)
        return "hierarchical" if hops + direct / _NEAR_BY_FAR < direct else "direct"


def node_size(ranks_per_node: Any) -> int | None:
    """Ranks of a node as the user sets them: the argument, else COMMLIB_NODE_SIZE, else None.

    Raises:
        ValueError: it is not a positive integer.
    """
    name, said = "ranks_per_node", ranks_per_node
    if said is None:
        name, said = "COMMLIB_NODE_SIZE", os.environ.get("COMMLIB_NODE_SIZE")
    if said is None:
        return None
    try:
        size = int(said) if isinstance(said, str) else operator.index(said)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an integer, got {said!r}") from None
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def find_topology(hosts: Sequence[Any], names: Sequence[str], size: int | None) -> Topology:
    """The topology of ranks on these hosts.

    Args:
        hosts: for each rank, what only ranks that can map each other's memory have in common.
        names: for each rank, its host's name.
        size: this many consecutive ranks are a node; None: those with the same host are.

    Raises:
        ConfigMismatch: ranks of different hosts would share a node.
    """
    keys = [rank // size for rank in range(len(hosts))] if size else list(hosts)
    numbers: dict[Any, int] = {}
    node_of = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
    first: dict[int, int] = {}
    for rank, node in enumerate(node_of):
        other = first.setdefault(node, rank)
        if hosts[other] != hosts[rank]:
            raise ConfigMismatch(
                f"ranks {other} ({names[other]}) and {rank} ({names[rank]}) cannot map each other's memory, "
                f"but ranks_per_node or COMMLIB_NODE_SIZE puts {size} consecutive ranks on a node"
            )
    return Topology(node_of, tuple(names[first[node]] for node in range(len(numbers))))
