"""Dispatch and combine as MoE layers call them: rows grouped by expert, and a weight for each row.

commlib does both itself. What is compared with it groups the rows that came, and sums them by weight before
they go back, with PyTorch's index operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.harness.layer_job import ALIGN, Grouped, padded
from bench.harness.turns import System
from bench.harness.workload import Job
from bench.systems.all_to_all import AllToAllBaseline
from bench.systems.commlib import OWNED, ZERO_COPY

CHUNK_BYTES = 2 << 20  # of sums


class CommlibGrouped(System):
    """commlib, with y in a tensor that the caller owns. Rows stay where they arrived, in any case."""

    name = OWNED

    def __init__(self, ep: Any) -> None:
        self._ep = ep
        self._handle: Any = None
        self._weights: Tensor | None = None

    def dispatch(self, job: Job) -> Grouped:
        d = self._ep.dispatch(job.x, job.topk_idx, job.topk_weights, layout="expert", align=ALIGN)
        self._handle, self._weights = d.handle, d.topk_weights
        return Grouped(d.x, d.topk_weights, d.offsets)

    def combine(self, y: Tensor) -> Tensor:
        return self._ep.combine(y, self._handle, weights=self._weights)

    def release(self) -> None:
        self._handle = self._weights = None


class CommlibGroupedZeroCopy(CommlibGrouped):
    """commlib reading y where the experts wrote it."""

    name = ZERO_COPY

    def place(self, job: Job) -> Tensor:
        return self._ep.combine_buffer(self._handle).copy_(job.y)


@dataclass(frozen=True)
class Groups:
    """Where rows lie, grouped. P pairs of one of N rows and a local expert; M places with the padding."""

    source: Tensor  # [M] the row at each place; 0 in padding
    padding: Tensor  # places of padding
    offsets: Tensor  # [L + 1] where each expert's places begin
    weights: Tensor  # [M] float32, 0 in padding
    bag: Tensor  # [P] places, grouped by row: combine sums these
    bag_start: Tensor  # [N] where each row's group begins in `bag`

    @staticmethod
    def of(topk_idx: Tensor, topk_weights: Tensor, local_experts: int) -> Groups:
        """Plan one grouping. Runs inside the timed region.

        Args:
            topk_idx: ``[N, K]`` local experts, -1: none.
            topk_weights: ``[N, K]``.
        """
        chosen = topk_idx >= 0
        row, k = chosen.nonzero(as_tuple=True)
        expert, order = topk_idx[row, k].sort(stable=True)
        counts = torch.bincount(expert, minlength=local_experts)
        offsets = torch.zeros(local_experts + 1, dtype=torch.int64)
        torch.cumsum(padded(counts), 0, out=offsets[1:])
        moved = offsets[:-1] - (counts.cumsum(0) - counts)
        place = torch.arange(len(order)) + moved[expert]
        places = int(offsets[-1])
        of_row = chosen.sum(1)
        return Groups(
            source=torch.zeros(places, dtype=torch.int64).index_copy_(0, place, row[order]),
            padding=torch.ones(places, dtype=torch.bool).index_fill_(0, place, 0).nonzero().flatten(),
            offsets=offsets,
            weights=torch.zeros(places).index_copy_(0, place, topk_weights[row, k][order]),
            bag=torch.empty_like(order).index_copy_(0, order, place),
            bag_start=of_row.cumsum(0) - of_row,
        )

    def sum_into(self, sums: Tensor, y: Tensor) -> None:
        """Sum each row's experts' outputs, by weight: y ``[M, H]`` into sums ``[N, H]``.

        `embedding_bag` makes a new tensor. A large one has new pages each time, which take longer than the
        sums; small ones have the same pages again.
        """
        weights = self.weights[self.bag].to(y.dtype)
        step = max(1, CHUNK_BYTES // (y.shape[1] * y.element_size()))
        ends = [*self.bag_start[::step].tolist(), len(self.bag)]
        for chunk, (begin, end) in enumerate(pairwise(ends)):
            rows = slice(chunk * step, (chunk + 1) * step)
            sums[rows] = torch.nn.functional.embedding_bag(
                self.bag[begin:end],
                y,
                self.bag_start[rows] - begin,
                mode="sum",
                per_sample_weights=weights[begin:end],
            )


class GroupBuffer:
    """Memory for grouped rows ``[M, H]``, allocated once; systems that take turns may share it."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        self._rows = torch.empty(0, hidden, dtype=dtype)

    def first(self, rows: int) -> Tensor:
        """Its first rows; what was in them may be lost."""
        if rows > len(self._rows):
            self._rows = self._rows.new_empty(rows, self._rows.shape[1])
        return self._rows[:rows]


class GroupedBaseline(System):
    """An all-to-all, or windows, and the grouping. Grouped rows are valid until the next dispatch."""

    def __init__(self, name: str, transport: AllToAllBaseline, buffer: GroupBuffer) -> None:
        self.name, self._transport, self._buffer = name, transport, buffer
        self._groups: Groups | None = None

    def dispatch(self, job: Job) -> Grouped:
        transport = self._transport
        rows = transport.dispatch(job.x, job.topk_idx, job.topk_weights)
        groups = Groups.of(transport.topk_idx, transport.topk_weights, transport.local_experts)
        grouped = self._buffer.first(len(groups.source))
        torch.index_select(rows, 0, groups.source, out=grouped).index_fill_(0, groups.padding, 0)
        self._groups = groups
        return Grouped(grouped, groups.weights, groups.offsets)

    def combine(self, y: Tensor) -> Tensor:
        groups = self._groups
        assert groups is not None
        sums = self._transport.output()[: len(groups.bag_start)]
        groups.sum_into(sums, y)
        return self._transport.combine(sums)
