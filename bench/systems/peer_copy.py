"""Dispatch and combine of in-process ranks on one GPU as they are written without commlib, in plain PyTorch:
gather, copies between the ranks' tensors, add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.systems.all_to_all import SendPlan
from commlib import Group


class PeerCopyBaseline:
    """In-process ranks on one GPU, as it is usually written: new tensors, `index_select`, `index_add_`.

    A rank lays out its rows for each destination; then each copies its parts from all ranks' tensors.
    No rank may go on to its next operation before all have ended this one: its tensors would change under
    the others' copies. The benchmark's clock fences them.

    Args:
        group: the in-process ranks.
        num_experts: E over all ranks, a multiple of R.
        hidden, topk: H and K.
        max_tokens: the most tokens a rank sends.
        dtype: of rows.
    """

    def __init__(
        self, group: Group, *, num_experts: int, hidden: int, topk: int, max_tokens: int, dtype: torch.dtype
    ) -> None:
        self._group, self._hidden, self._topk = group, hidden, topk
        self._local_experts = num_experts // group.size
        self._sent: list[int] = []
        self._received: list[int] = []

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Rows received ``[N, H]``, by source rank, then token; ids and weights in the attributes."""
        plan = self._plan = SendPlan.of(topk_idx, topk_weights, self._group.size, self._local_experts)
        self._sent = plan.counts.tolist()
        self._received = [sent[self._group.rank] for sent in self._group.allgather(self._sent)]
        rows, meta = self._exchange(self._gather(x, plan), plan.meta.split(self._sent))
        meta = torch.cat(meta)
        self.topk_idx = meta[:, : self._topk]
        self.topk_weights = meta[:, self._topk :].view(torch.float32)
        return self._received_rows(rows)

    def combine(self, y: Tensor) -> Tensor:
        """Rows y ``[N, H]`` back at their sources and summed there: ``[T, H]``."""
        (rows,) = self._exchange(y.split(self._received))
        return self._sum(self._returned_rows(rows), self._plan)

    def _exchange(self, *kinds: Sequence[Tensor]) -> list[list[Tensor]]:
        """Offer one tensor of each kind to each rank; return those that all ranks offer to this one, by kind.

        The current stream waits until they are written.
        """
        written = torch.cuda.Event()
        written.record()
        offers = self._group.allgather((kinds, written))
        self._offered = kinds  # others may still copy from them when this rank's copies are done
        for _, their_event in offers:
            torch.cuda.current_stream().wait_event(their_event)
        mine = self._group.rank
        return [[theirs[kind][mine] for theirs, _ in offers] for kind in range(len(kinds))]

    # -- what the tuned one does otherwise -------------------------------------------------------------------

    def _gather(self, x: Tensor, plan: SendPlan) -> Sequence[Tensor]:
        """Rows for each destination."""
        return [x.index_select(0, tokens) for tokens in plan.tokens.split(self._sent)]

    def _received_rows(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    def _returned_rows(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    def _sum(self, rows: Tensor, plan: SendPlan) -> Tensor:
        total = torch.zeros(len(plan.bag_start), self._hidden, device=rows.device)
        return total.index_add_(0, plan.tokens, rows.float()).to(rows.dtype)


class TunedPeerCopyBaseline(PeerCopyBaseline):
    """The same as fast as we could write it: every large tensor allocated once, one `index_select` for all
    destinations, and one `embedding_bag`, which sums in fp32 and rounds once."""

    def __init__(self, group: Group, device: str, **shape: Any) -> None:
        super().__init__(group, **shape)
        most = group.size * shape["max_tokens"]
        self._out_rows = torch.empty(most, shape["hidden"], dtype=shape["dtype"], device=device)
        self._in_rows = torch.empty_like(self._out_rows)

    def _gather(self, x: Tensor, plan: SendPlan) -> Sequence[Tensor]:
        out = self._out_rows[: sum(self._sent)]
        return torch.index_select(x, 0, plan.tokens, out=out).split(self._sent)

    def _received_rows(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, out=self._in_rows[: sum(self._received)])

    def _returned_rows(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, out=self._out_rows[: sum(self._sent)])

    def _sum(self, rows: Tensor, plan: SendPlan) -> Tensor:
        return torch.nn.functional.embedding_bag(plan.bag, rows, plan.bag_start, mode="sum")
