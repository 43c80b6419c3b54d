"""Where uniformly routed tokens go: expected destinations in closed form."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from commlib._core import Placement
from commlib.model.checks import keep_int


@dataclass(frozen=True)
class UniformRouting:
    """Expectations for tokens that choose ``topk`` different experts, every choice equally likely.

    Rank r owns the experts ``[r*E//R, (r+1)*E//R)``, as everywhere in commlib; a node is ``ranks // nodes``
    consecutive ranks. docs/model.md has the formulas under "Routing".

    Args:
        experts: E, over all ranks.
        topk: K, experts for each token.
        ranks: R.
        nodes: N, which divides R.
        node_limit: a token's experts lie on at most this many nodes, those of its best experts (DeepSeek's
            group-limited gating, a node being a group). Nodes must then own equally many experts.

    Raises:
        ValueError, TypeError: a value that makes no sense; the text names it.
    """

    experts: int
    topk: int
    ranks: int
    nodes: int = 1
    node_limit: int | None = None

    def __post_init__(self) -> None:
        keep_int(self, "experts", 1)
        keep_int(self, "topk", 1, self.experts)
        keep_int(self, "ranks", 1)
        keep_int(self, "nodes", 1)
        if self.ranks % self.nodes:
            raise ValueError(f"nodes must divide ranks, got {self.nodes} nodes for {self.ranks} ranks")
        if self.node_limit is not None:
            keep_int(self, "node_limit", 1, self.nodes)
            self._check_limit(self.node_limit)

    def _check_limit(self, limit: int) -> None:
        if self.experts % self.nodes:
            raise ValueError(
                f"node_limit needs equally many experts on each node, got {self.experts} on {self.nodes}"
            )
        if limit * self.experts // self.nodes < self.topk:
            raise ValueError(
                f"node_limit={limit} leaves {limit * self.experts // self.nodes} experts, topk is {self.topk}"
            )

    def experts_on(self, rank: int) -> int:
        """How many experts a rank owns."""
        return len(self._placement.experts_of(rank))

    @cached_property
    def _placement(self) -> Placement:
        return Placement(self.experts, self.ranks)

    @cached_property
    def rank_share(self) -> tuple[float, ...]:
        """For each rank, the probability that a token goes there."""
        return self._shares([self.experts_on(rank) for rank in range(self.ranks)])

    @cached_property
    def node_share(self) -> tuple[float, ...]:
        """For each node, the probability that a token goes there."""
        each = self.ranks // self.nodes
        owned = [sum(self.experts_on(node * each + i) for i in range(each)) for node in range(self.nodes)]
        return self._shares(owned)

    @property
    def unique_ranks(self) -> float:
        """Ranks that a token goes to, its own included if it owns one of the experts."""
        return sum(self.rank_share)

    @property
    def unique_nodes(self) -> float:
        """Nodes that a token goes to, its own included."""
        return sum(self.node_share)

    def _shares(self, owned: list[int]) -> tuple[float, ...]:
        hit = {n: 1.0 - self._missed(n) for n in set(owned)}
        return tuple(hit[n] for n in owned)

    def _missed(self, owned: int) -> float:
        """The probability that none of a token's experts is among ``owned`` given ones."""
        if self.node_limit is None or self.node_limit == self.nodes:
            return missed(self.experts, self.topk, owned)
        return missed_within_nodes(self.experts, self.topk, owned, self.nodes, self.node_limit)


def missed(experts: int, topk: int, owned: int) -> float:
    """C(E - n, K) / C(E, K): the probability that K of E experts, none twice, are none of n given ones."""
    return math.comb(experts - owned, topk) / math.comb(experts, topk)


def missed_within_nodes(experts: int, topk: int, owned: int, nodes: int, limit: int) -> float:
    """The same where a token's experts lie on at most ``limit`` nodes, and the n given ones on one node.

    A token takes its experts in order of their score. Until it has met ``limit`` nodes all experts are open
    to it, from then on only those of the nodes it has met. The state after each choice: how many other nodes
    it has met, and how many experts it took there; all its other experts are on the node in question, none of
    them among the n.
    """
    size = experts // nodes
    states = {(0, 0): 1.0}
    out_of_reach = 0.0
    for taken in range(topk):
        following: dict[tuple[int, int], float] = defaultdict(float)
        for (met, elsewhere), p in states.items():
            here = taken - elsewhere
            full = met + (here > 0) == limit
            if full and here == 0:
                out_of_reach += p  # the node in question is no longer open
                continue
            open_experts = (met + 1) * size if full else experts
            p /= open_experts - taken
            following[met, elsewhere + 1] += p * (met * size - elsewhere)
            if not full:
                following[met + 1, elsewhere + 1] += p * (nodes - 1 - met) * size
            following[met, elsewhere] += p * (size - owned - here)
        states = following
    return out_of_reach + sum(states.values())
