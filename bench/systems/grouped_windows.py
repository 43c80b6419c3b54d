"""The layer path through MPI's shared windows: rows go straight to their groups, sums come from there.

The best that we could write with MPI on one node, as :mod:`bench.systems.windows` is for the rank path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness.layer_job import ALIGN, Grouped, padded
from bench.harness.turns import System
from bench.harness.workload import Job
from bench.systems.windows import SharedRows, meet


@dataclass(frozen=True)
class Places:
    """Where one rank's pairs of a token and an expert go, by global expert. P pairs, E experts, R ranks.

    A place is a row of all ranks' blocks together.
    """

    tokens: Tensor  # [P] by expert, then token
    weights: Tensor  # [P] float32
    counts: Tensor  # [E] pairs
    begins: Tensor  # [E] this rank's first place at each expert
    places: Tensor  # [P]
    bag: Tensor  # [P] the same by token
    bag_weights: Tensor  # [P] weights by token
    bag_start: Tensor  # [T]
    padding: Tensor  # places in this rank's block that no rank writes to
    offsets: Tensor  # [E / R + 1] in this rank's block


class GroupedWindows(System):
    """Ranks meet as in :class:`bench.systems.windows.WindowsBaseline`, which says why that is safe.

    Args:
        name: of the system.
        comm: mpi4py communicator of ranks on one host.
        max_tokens: tokens of a rank, at most.
        num_experts, topk, hidden, dtype: of the job.
    """

    def __init__(
        self,
        name: str,
        comm: Any,
        *,
        num_experts: int,
        topk: int,
        hidden: int,
        max_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        self.name, self._comm = name, comm
        local = num_experts // comm.size
        self._most = comm.size * max_tokens * min(topk, local) + local * (ALIGN - 1)
        self._rows, self._sums = (SharedRows(comm, self._most, hidden, dtype) for _ in range(2))
        self._weights = SharedRows(comm, self._most, 1, torch.float32)
        self._counts = np.zeros((comm.size, num_experts), np.int64)
        self._known: Places | None = None

    def dispatch(self, job: Job) -> Grouped:
        known = self._known = self._plan(job.topk_idx, job.topk_weights)
        rows, weights = self._rows.rows, self._weights.rows
        tokens = known.tokens.split(known.counts.tolist())
        for begin, mine in zip(known.begins.tolist(), tokens, strict=True):
            torch.index_select(job.x, 0, mine, out=rows[begin : begin + len(mine)])
        rows.index_fill_(0, known.padding, 0)
        weights.index_copy_(0, known.places, known.weights.unsqueeze(1))
        weights.index_fill_(0, known.padding, 0)
        meet(self._comm, self._rows, self._weights)
        block = slice(self._comm.rank * self._most, self._comm.rank * self._most + int(known.offsets[-1]))
        return Grouped(rows[block], weights[block].flatten(), known.offsets)

    def place(self, job: Job) -> Tensor:
        begin = self._comm.rank * self._most
        return self._sums.rows[begin : begin + len(job.y)].copy_(job.y)

    def combine(self, y: Tensor) -> Tensor:
        """``y`` is what `place` has written."""
        known = self._known
        assert known is not None
        meet(self._comm, self._sums)
        return torch.nn.functional.embedding_bag(
            known.bag,
            self._sums.rows,
            known.bag_start,
            mode="sum",
            per_sample_weights=known.bag_weights.to(y.dtype),
        )

    def close(self) -> None:
        """Give the windows back. Called by all ranks."""
        for window in (self._rows, self._sums, self._weights):
            window.close()

    def _plan(self, topk_idx: Tensor, topk_weights: Tensor) -> Places:
        topk, rank, ranks = topk_idx.shape[1], self._comm.rank, self._comm.size
        chosen = topk_idx >= 0
        pair = chosen.flatten().nonzero().flatten()
        expert, order = topk_idx.flatten()[pair].sort(stable=True)
        counts = torch.bincount(expert, minlength=self._counts.shape[1])
        self._comm.Allgather(counts.numpy(), self._counts)
        by_rank = torch.from_numpy(self._counts)
        sizes = by_rank.sum(0).view(ranks, -1)
        rooms = padded(sizes)
        ends = rooms.cumsum(1)
        groups = (ends - rooms) + torch.arange(ranks).unsqueeze(1) * self._most
        begins = groups.flatten() + by_rank[:rank].sum(0)
        places = torch.arange(len(order)) + (begins - (counts.cumsum(0) - counts))[expert]
        weights = topk_weights.flatten()[pair]
        unfilled = (rooms - sizes)[rank]
        first = (groups + sizes)[rank] - (unfilled.cumsum(0) - unfilled)
        padding = torch.arange(int(unfilled.sum())) + first.repeat_interleave(unfilled)
        of_token = chosen.sum(1)
        return Places(
            tokens=pair[order] // topk,
            weights=weights[order],
            counts=counts,
            begins=begins,
            places=places,
            bag=torch.empty_like(places).index_copy_(0, order, places),
            bag_weights=weights,
            bag_start=of_token.cumsum(0) - of_token,
            padding=padding,
            offsets=torch.nn.functional.pad(ends[rank], (1, 0)),
        )
