"""Dispatch and combine as they are written without commlib: one all-to-all, over gloo, MPI or NCCL.

These are meant to be hard to beat with the tools they use. A token crosses once to each rank that
owns one of its experts, every large buffer is allocated once, rows are gathered by one
`index_select` and summed by one `embedding_bag` (a single pass, fp32 sums, one rounding; about
five times as fast as `index_add_` into an fp32 buffer), and there are no needless copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness.turns import System
from bench.harness.workload import Job, Received


@dataclass(frozen=True)
class SendPlan:
    """Which tokens go where. S rows leave this rank, ordered by destination rank, then by token."""

    tokens: Tensor  # [S] source token of each row sent
    meta: Tensor  # [S, 2K] int32: local expert ids (-1: none), then the bits of their fp32 weights
    counts: Tensor  # [R] int64, rows for each rank
    bag: Tensor  # [S] rows sent, grouped by token, in each group by rank: combine sums these
    bag_start: Tensor  # [T] where each token's group begins in `bag`

    @staticmethod
    def of(topk_idx: Tensor, topk_weights: Tensor, ranks: int, local_experts: int) -> SendPlan:
        """Plan one dispatch. Runs inside the timed region, so it is a dozen small tensor ops."""
        num_tokens = topk_idx.shape[0]
        owner = topk_idx // local_experts  # floors: -1 stays -1, and goes to line 0 below
        goes = torch.zeros(ranks + 1, num_tokens, dtype=torch.bool, device=topk_idx.device)
        by_rank = goes.scatter_(0, (owner + 1).t(), True)[1:]  # [R, T]
        rank, tokens = by_rank.nonzero(as_tuple=True)

        rank = rank.unsqueeze(1)
        mine = owner[tokens] == rank
        ids = torch.where(mine, topk_idx[tokens] - rank * local_experts, -1).to(torch.int32)
        weights = torch.where(mine, topk_weights[tokens], 0.0).view(torch.int32)

        row_of = (by_rank.flatten().cumsum(0) - 1).view(ranks, num_tokens)
        copies = by_rank.sum(0)
        return SendPlan(
            tokens=tokens,
            meta=torch.cat([ids, weights], 1),
            counts=by_rank.sum(1),
            bag=row_of.t().masked_select(by_rank.t()),
            bag_start=copies.cumsum(0) - copies,
        )


class AllToAllBaseline(ABC):
    """Dispatch and combine over some all-to-all with split sizes; subclasses supply that.

    Args:
        rank, ranks: place in the group and its size R.
        num_experts: E over all ranks, a multiple of R.
        hidden, topk: H and K.
        max_tokens: the most tokens a rank sends; buffers hold ``ranks * max_tokens`` rows, of which
            only those in use are ever touched.
        dtype: of rows.
        device: of all tensors.
    """

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        num_experts: int,
        hidden: int,
        topk: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rank, self.ranks, self.topk = rank, ranks, topk
        self.local_experts = num_experts // ranks
        most = ranks * max_tokens
        self._device = torch.device(device)
        # Rows wait here to be sent; later, combine receives into it.
        self._out_rows = self._empty(most, hidden, dtype=dtype)
        self._in_rows = self._empty(most, hidden, dtype=dtype)
        self._in_meta = self._empty(most, 2 * topk, dtype=torch.int32)
        self._plan: SendPlan | None = None
        self._sent: list[int] = []
        self._received: list[int] = []
        self.topk_idx = self._in_meta[:0, :topk]
        self.topk_weights = self._in_meta[:0, topk:].view(torch.float32)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Send each row of x ``[T, H]`` once to every rank that owns one of its experts.

        Returns:
            Rows received ``[N, H]``, by source rank, then token: a view, valid until the next
            dispatch. Their local expert ids and weights ``[N, K]`` are in `topk_idx`,
            `topk_weights`.
        """
        plan = self._plan = self._plan_of(topk_idx, topk_weights)
        self._sent = plan.counts.tolist()
        self._received = self._exchange_counts(plan.counts)
        meta_arrives = self._start_meta(plan)
        torch.index_select(x, 0, plan.tokens, out=self._out_rows[: len(plan.tokens)])
        return self._exchange_rows(meta_arrives)

    def output(self) -> Tensor:
        """Memory for y, ``[ranks * max_tokens, H]``: over the rows that came, which have been read."""
        return self._in_rows

    def combine(self, y: Tensor) -> Tensor:
        """Return rows y ``[N, H]`` to their sources and sum them there: ``[T, H]``."""
        if self._plan is None:
            raise RuntimeError("combine before any dispatch")
        back = self._out_rows[: sum(self._sent)]
        self._start(back, y, self._sent, self._received).wait()
        return torch.nn.functional.embedding_bag(self._plan.bag, back, self._plan.bag_start, mode="sum")

    def _plan_of(self, topk_idx: Tensor, topk_weights: Tensor) -> SendPlan:
        return SendPlan.of(topk_idx, topk_weights, self.ranks, self.local_experts)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer that is kept."""
        return torch.empty(*shape, dtype=dtype, device=self._device)

    def _start_meta(self, plan: SendPlan) -> Any:
        """Begin to send ids and weights; their numbers, both ways, are known."""
        return self._start(self._in_meta[: sum(self._received)], plan.meta, self._received, self._sent)

    def _exchange_rows(self, meta_arrives: Any) -> Tensor:
        """Send the gathered rows, and take those that came: rows as returned by dispatch."""
        out_rows, in_rows = self._out_rows[: sum(self._sent)], self._in_rows[: sum(self._received)]
        self._start(in_rows, out_rows, self._received, self._sent).wait()
        meta_arrives.wait()
        return self._take(len(in_rows))

    def _take(self, received: int) -> Tensor:
        in_meta = self._in_meta[:received]
        self.topk_idx = in_meta[:, : self.topk]
        self.topk_weights = in_meta[:, self.topk :].view(torch.float32)
        return self._in_rows[:received]

    @abstractmethod
    def _exchange_counts(self, counts: Tensor) -> list[int]:
        """Tell each rank how many rows it will get; return how many come from each."""

    @abstractmethod
    def _start(self, into: Tensor, source: Tensor, into_rows: list[int], rows: list[int]) -> Any:
        """Begin an all-to-all of rows; the result's ``wait()`` ends it."""


class Baseline(System):
    """gloo, MPI, NCCL, ...: an all-to-all."""

    def __init__(self, name: str, transport: AllToAllBaseline) -> None:
        self.name, self._transport = name, transport

    def dispatch(self, job: Job) -> Received:
        rows = self._transport.dispatch(job.x, job.topk_idx, job.topk_weights)
        return Received(rows, self._transport.topk_idx, self._transport.topk_weights)

    def combine(self, y: Tensor) -> Tensor:
        return self._transport.combine(y)
