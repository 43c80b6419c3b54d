"""What is compared across nodes, and what each operation sends over a node's link."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import commlib
from bench.harness.launch import Launch
from bench.harness.turns import Report, System
from bench.harness.workload import Job, Shape
from bench.rig.netns import Node
from bench.rig.node_ranks import NodesLaunch, Traffic
from bench.systems.all_to_all import Baseline
from bench.systems.commlib import Commlib
from bench.systems.gloo import GlooBaseline, RowPerExpertGloo
from bench.systems.mpi import MpiBaseline
from bench.systems.tcp import Mesh
from commlib.cli.measuring import Interval

EACH, GLOO, MPI, DIRECT, HIERARCHICAL, BARE = (
    "gloo, row per expert",
    "gloo, row per rank",
    "MPI, row per rank",
    "commlib direct",
    "commlib hierarchical",
    "bare TCP, row per node",
)


class Counted(System):
    """A system with the job that fits it, and the bytes that each operation sent over this node's link."""

    def __init__(self, system: System, job: Job) -> None:
        self.name, self._system, self._job = system.name, system, job
        self.traffic: dict[str, list[Traffic]] = {"dispatch": [], "combine": []}

    def iterate(self, job: Job, launch: Launch, report: Report | None) -> tuple[Interval, Interval]:
        assert isinstance(launch, NodesLaunch)
        launch.noted.clear()
        intervals = self._system.iterate(self._job, launch, report)
        for noted, traffic in zip(launch.noted, self.traffic.values(), strict=True):
            traffic.append(noted)
        return intervals


class BareTcp(System):
    """The rows that must cross, each once to a node, through plain sockets: nothing is gathered or summed.

    It shows what the links, and the cores that forward for them, allow.
    """

    name = BARE

    def __init__(self, launch: NodesLaunch, rows: Rows, row_bytes: int) -> None:
        leader = launch.rank % launch.ranks_per_node == 0
        addresses = [Node(i, launch.nodes, "").address for i in range(launch.nodes)]
        self._mesh = Mesh(addresses, launch.node) if leader else None
        others = [node for node in range(launch.nodes) if node != launch.node]
        between = rows.per_node * row_bytes
        self._out = {node: int(between[launch.node, node]) for node in others}
        self._in = {node: int(between[node, launch.node]) for node in others}

    def iterate(self, job: Job, launch: Launch, report: Report | None) -> tuple[Interval, Interval]:
        dispatched, _ = launch.fenced(lambda: self._exchange(self._out, self._in))
        combined, _ = launch.fenced(lambda: self._exchange(self._in, self._out))
        return dispatched, combined

    def close(self) -> None:
        if self._mesh is not None:
            self._mesh.close()

    def _exchange(self, out: dict[int, int], into: dict[int, int]) -> None:
        if self._mesh is not None:
            self._mesh.exchange(out, into)


@dataclass(frozen=True)
class Rows:
    """Rows from each node to each other ``[nodes, nodes]`` in one dispatch of this routing.

    Combine moves as many back.
    """

    per_node: np.ndarray  # each token once to a node
    per_rank: np.ndarray  # each token once to a rank
    per_expert: np.ndarray

    @staticmethod
    def of(launch: NodesLaunch, job: Job, local_experts: int) -> Rows:
        tokens, shape = len(job.x), (launch.nodes, launch.ranks_per_node)
        owner = job.topk_idx // local_experts
        chosen = torch.zeros(tokens, launch.size, dtype=torch.int64)
        chosen.scatter_add_(1, owner, torch.ones_like(owner))
        chosen = chosen.view(tokens, *shape)
        mine = [
            (chosen.sum(2) > 0).sum(0),
            (chosen > 0).sum((0, 2)),
            chosen.sum((0, 2)),
        ]
        every = np.array(launch.gather([to.tolist() for to in mine]))  # [ranks, 3, nodes]
        by_node = every.reshape(*shape, 3, launch.nodes).sum(1).transpose(1, 0, 2)
        for matrix in by_node:
            np.fill_diagonal(matrix, 0)
        return Rows(*by_node)

    def busiest(self, between: np.ndarray) -> int:
        """Rows on the busiest direction of any node's link."""
        return int(max(between.sum(0).max(), between.sum(1).max()))


@contextmanager
def open_systems(
    launch: NodesLaunch, shape: Shape, job: Job, rows: Rows
) -> Iterator[tuple[list[Counted], dict[str, str]]]:
    """All systems that can run here, and the reasons why others cannot."""
    skipped = {}
    with ExitStack() as stack:
        bare = BareTcp(launch, rows, shape.hidden * shape.dtype.itemsize)
        stack.callback(bare.close)
        each = Job.build(shape, launch.rank, launch.size, row_per_expert=True)
        counted = [
            Counted(Baseline(EACH, RowPerExpertGloo(launch.group, **shape.sizes)), each),
            Counted(Baseline(GLOO, GlooBaseline(launch.group, **shape.sizes)), job),
        ]
        if launch.comm is None:
            skipped[MPI] = launch.no_mpi
        else:
            counted.append(Counted(Baseline(MPI, MpiBaseline(launch.comm, **shape.sizes)), job))
        for name, routing in ((DIRECT, "direct"), (HIERARCHICAL, "hierarchical")):
            across: dict[str, Any] = {"routing": routing, "ranks_per_node": launch.ranks_per_node}
            ep = commlib.ExpertParallel(launch.ranks, device="cpu", **across, **shape.sizes)
            stack.callback(ep.close)
            system = Commlib(ep)
            system.name = name
            counted.append(Counted(system, job))
        counted.append(Counted(bare, job))
        yield counted, skipped
