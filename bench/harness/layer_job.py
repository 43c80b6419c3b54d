"""The same job as a MoE layer has it: rows grouped by local expert, and sums weighted by the router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness.workload import Job, Received, Shape, different_rows, different_sums

ALIGN = 8  # rows: a group's size is a multiple, as grouped matmuls want it


@dataclass(frozen=True)
class Grouped:
    """What a dispatch yields. P pairs of a row and a local expert, M with the padding.

    Attributes:
        rows: ``[M, H]`` by local expert, in each group by source rank, then token; padding is zero.
        topk_weights: ``[M]`` float32, zero in padding.
        offsets: ``[local experts + 1]`` int64, where each group begins, after padding.
    """

    rows: Tensor
    topk_weights: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class LayerJob(Job):
    """One rank's part. `y` and `output` are ``[M, H]``; y's padding is not zero, and must not be summed."""

    expected: Any  # Grouped
    magnitude: Tensor  # [T, H] float32, sums of absolute values, by which roundings are judged

    @staticmethod
    def of(job: Job, shape: Shape, rank: int, ranks: int) -> LayerJob:
        """The tokens of a job. There experts of a rank are alike; here each has a factor of its own."""
        local_experts = shape.experts // ranks
        grouped, y = _grouped(job.expected, range(rank * local_experts, (rank + 1) * local_experts))
        total, magnitude = (torch.zeros(job.x.shape, dtype=torch.float32) for _ in range(2))
        for k in range(job.topk_idx.shape[1]):
            weighted = expert(job.x, job.topk_idx[:, k, None]).float() * job.topk_weights[:, k, None]
            total += weighted
            magnitude += weighted.abs()
        return LayerJob(
            x=job.x,
            topk_idx=job.topk_idx,
            topk_weights=job.topk_weights,
            expected=grouped,
            y=y,
            output=torch.empty_like(y),
            expected_sum=total,
            magnitude=magnitude,
        )

    def wrong_rows(self, got: Any) -> list[str]:
        """The differences, bit for bit, from the groups that must arrive (:class:`Grouped`)."""
        names = ("rows", "topk_weights", "offsets")
        return different_rows({name: (getattr(got, name), getattr(self.expected, name)) for name in names})

    def wrong_sum(self, out: Tensor) -> list[str]:
        """Where a combine is further from the exact sum than three roundings to the rows' dtype.

        Those of the weights, which `embedding_bag` wants in the rows' dtype, of a rank's sums, and of the sum
        over ranks; each is at most half an eps.
        """
        eps = 2 * torch.finfo(out.dtype).eps + 16 * torch.finfo(torch.float32).eps
        return different_sums(out, self.expected_sum, eps * self.magnitude)


def padded(counts: Tensor) -> Tensor:
    """The sizes of groups of so many rows."""
    return (counts + (ALIGN - 1)).div(ALIGN, rounding_mode="floor") * ALIGN


def expert(rows: Tensor, number: Tensor | int) -> Tensor:
    """The output of an expert, or of one for each row ``[N, 1]``: neighbors differ in sign, so that a row
    from the wrong one shows in spite of roundings."""
    return (rows.float() * ((1 + number % 5) * (1 - number % 2 * 2))).to(rows.dtype)


def _grouped(received: Received, experts: range) -> tuple[Grouped, Tensor]:
    """The rows that a rank receives, expert by expert, and the experts' output for them."""
    rows, weights, outputs, offsets = [], [], [], [0]
    for local, number in enumerate(experts):
        row, place = (received.topk_idx == local).nonzero(as_tuple=True)
        padding = -len(row) % ALIGN
        mine = received.rows[row]
        rows += [mine, mine.new_zeros(padding, mine.shape[1])]
        weights += [received.topk_weights[row, place], torch.zeros(padding)]
        outputs += [expert(mine, number), mine.new_ones(padding, mine.shape[1])]
        offsets.append(offsets[-1] + len(row) + padding)
    return Grouped(torch.cat(rows), torch.cat(weights), torch.tensor(offsets)), torch.cat(outputs)
