"""``commlib topo``: which ranks share a node, and whether UCX is there to go between nodes."""

from __future__ import annotations

from typing import Any

from commlib import _core
from commlib.startup import ucx
from commlib.startup.connect import own_place
from commlib.startup.conversation import gather
from commlib.startup.group import resolve_group
from commlib.startup.topology import Topology, find_topology, node_size


def topo(ranks_per_node: int | None) -> bool:
    """Gather, and print on rank 0. Every rank calls it; returns whether ranks could run like this."""
    group = resolve_group()
    places = gather(group, "places", own_place() | {"ucx": _ucx()})
    size = node_size(ranks_per_node)
    topology = find_topology([p["host"] for p in places], [p["host_name"] for p in places], size)
    if group.rank == 0:
        _print(topology, places, size)
    return len(topology.hosts) == 1 or all(p["ucx"][0] for p in places)


def _ucx() -> tuple[bool, str]:
    """Whether there is a UCX, and its version or what was tried."""
    try:
        return True, f"UCX {_core.load_ucx(ucx.candidates())}"
    except RuntimeError as error:
        return False, str(error)


def _print(topology: Topology, places: list[dict[str, Any]], size: int | None) -> None:
    ranks, nodes = len(topology.node_of), len(topology.hosts)
    how = f"{size} ranks a node, as set" if size else "those that can map each other's memory share one"
    print(f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)} ({how})")
    for node, members in enumerate(topology.nodes):
        print(f"  node {node}, {topology.hosts[node]}: ranks {_listed(members)}")
        for other in range(nodes):
            if other != node:
                ways = ", ".join(f"{r} to {topology.gateway(r, other)}" for r in members)
                print(f"    two hops to node {other} go by its gateways: {ways}")
    if nodes == 1:
        print("One node: ranks map each other's memory, and UCX is not needed.")
    for there, said in dict.fromkeys(tuple(p["ucx"]) for p in places):
        having = [rank for rank, p in enumerate(places) if tuple(p["ucx"]) == (there, said)]
        whose = "" if len(having) == ranks else f"ranks {_listed(having)}: "
        if not there:
            need = "Between nodes it would be" if nodes == 1 else "Rows go between nodes through UCX"
            said = f"{need}, but {said}\n{ucx.ADVICE}"
        print(f"{whose}{said}")


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
