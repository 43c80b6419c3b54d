"""A MoE layer over an all-to-all, as it is usually written: permute, all-to-all, grouped matmul, all-to-all,
unpermute.

A row goes out for each of a token's experts, wherever they are. Autograd goes through all of it: the adjoint
of an all-to-all is the all-to-all the other way. Router and experts are modules of commlib.nn, so that layers
differ only in how rows move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench.systems.mpi import RowTypes
from commlib.nn import Experts, RouterOutput
from commlib.nn.losses import count_tokens


class Exchange(ABC):
    """An all-to-all of rows.

    Attributes:
        sent_bytes: sent to other ranks so far.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.sent_bytes = rank, size, 0

    def rows(self, source: Tensor, rows: list[int], into_rows: list[int]) -> Tensor:
        """Send ``rows[r]`` of ``[N, ...]`` to rank r; return what came, ``into_rows[r]`` from rank r."""
        source = source.contiguous()
        into = source.new_empty(sum(into_rows), *source.shape[1:])
        row_bytes = source[:1].nbytes if len(source) else 0
        self.sent_bytes += (sum(rows) - rows[self.rank]) * row_bytes
        self._move(source, into, rows, into_rows)
        return into

    def counts(self, counts: Tensor) -> Tensor:
        """Send row r of ``[R, n]`` to rank r; return what came."""
        return self.rows(counts, [1] * self.size, [1] * self.size)

    @abstractmethod
    def _move(self, source: Tensor, into: Tensor, rows: list[int], into_rows: list[int]) -> None:
        """Move the rows; both tensors are contiguous."""


class TorchExchange(Exchange):
    """``torch.distributed.all_to_all_single``, over gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group

    def _move(self, source: Tensor, into: Tensor, rows: list[int], into_rows: list[int]) -> None:
        dist.all_to_all_single(into, source, into_rows, rows, group=self._group)


class MpiExchange(Exchange):
    """mpi4py's ``Alltoallv``; one element is a row, so that no count can exceed an int32."""

    def __init__(self, comm: Any) -> None:
        super().__init__(comm.rank, comm.size)
        self._comm = comm
        self._row_type = RowTypes()

    def _move(self, source: Tensor, into: Tensor, rows: list[int], into_rows: list[int]) -> None:
        row = self._row_type(source.stride(0) * source.element_size())
        self._comm.Alltoallv(
            [source.view(torch.uint8).numpy(), rows, row],
            [into.view(torch.uint8).numpy(), into_rows, row],
        )


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange, sent: list[int], received: list[int]) -> Tensor:
        ctx.back = exchange, received, sent
        return exchange.rows(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        exchange, sent, received = ctx.back
        return exchange.rows(grad, sent, received), None, None, None


class AllToAllLayer(nn.Module):
    """``[T, H] -> [T, H]``, the experts spread over the ranks of an exchange.

    Args:
        experts: of this rank; every rank has equally many.
        align: each expert's rows are padded to a multiple of this, for the grouped matmul.
    """

    def __init__(
        self, router: Callable[[Tensor], RouterOutput], experts: Experts, exchange: Exchange, align: int
    ) -> None:
        super().__init__()
        self.router, self.experts, self.exchange, self.align = router, experts, exchange, align
        self.local_experts = len(experts.w1)

    def forward(self, x: Tensor) -> Tensor:
        topk_idx, topk_weights, _ = self.router(x)
        order = topk_idx.flatten().argsort(stable=True)  # by expert, and so by rank
        counts = count_tokens(topk_idx, self.exchange.size * self.local_experts)
        counts = counts.view(self.exchange.size, self.local_experts)
        arriving = self.exchange.counts(counts)
        offsets = self._offsets(arriving)
        # The host waits once, for all numbers that it needs.
        known = torch.cat([counts.sum(1), arriving.sum(1), offsets[-1:]]).tolist()
        sent, received, padded = known[: len(counts)], known[len(counts) : -1], known[-1]
        rows = _AllToAll.apply(x[order // topk_idx.shape[1]], self.exchange, sent, received)
        place = self._places(arriving, offsets, sum(received))
        grouped = rows.new_zeros(padded, rows.shape[1]).index_copy(0, place, rows)
        y = self.experts(grouped, offsets)[place]
        y = _AllToAll.apply(y, self.exchange, received, sent)
        y = y.new_empty(y.shape).index_copy(0, order, y).view(*topk_idx.shape, -1)
        return torch.bmm(topk_weights.unsqueeze(1), y.to(topk_weights.dtype)).squeeze(1).to(x.dtype)

    def _offsets(self, arriving: Tensor) -> Tensor:
        """Where each expert's rows begin, and the last one's end: ``[L + 1]``.

        Args:
            arriving: ``[R, L]``, rows from each rank for each expert, which come in that order.
        """
        padded = (arriving.sum(0) + self.align - 1).div(self.align, rounding_mode="floor").mul(self.align)
        return F.pad(padded.cumsum(0), (1, 0))

    def _places(self, arriving: Tensor, offsets: Tensor, received: int) -> Tensor:
        """Where each of the rows that came goes, grouped by expert."""
        begins = (offsets[:-1] + arriving.cumsum(0) - arriving).flatten()
        blocks = arriving.flatten()
        came_at = blocks.cumsum(0) - blocks
        moved = (begins - came_at).repeat_interleave(blocks, output_size=received)
        return torch.arange(received, device=blocks.device) + moved
