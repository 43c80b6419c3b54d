"""The all-to-all over gloo: as usually written, as fast as we could write it, with a row for each expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.systems.all_to_all import AllToAllBaseline, SendPlan


class GlooBaseline(AllToAllBaseline):
    """`torch.distributed.all_to_all_single` with split sizes, over a gloo process group."""

    def __init__(self, group: dist.ProcessGroup | None, **shape: Any) -> None:
        super().__init__(rank=dist.get_rank(group), ranks=dist.get_world_size(group), **shape)
        self._group = group

    def _exchange_counts(self, counts: Tensor) -> list[int]:
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self._group)
        return received.tolist()

    def _start(self, into: Tensor, source: Tensor, into_rows: list[int], rows: list[int]) -> Any:
        # As bytes: gloo only copies, and bytes work for every dtype.
        return dist.all_to_all_single(
            into.view(torch.uint8),
            source.view(torch.uint8),
            into_rows,
            rows,
            group=self._group,
            async_op=True,
        )


class RowPerExpertGloo(GlooBaseline):
    """The same with a row for each expert of a token: K rows out, and K rows back, wherever they go."""

    def __init__(self, group: dist.ProcessGroup | None, **shape: Any) -> None:
        self._experts_per_token = shape["topk"]
        pairs = {"topk": 1, "max_tokens": shape["max_tokens"] * shape["topk"]}
        super().__init__(group, **shape | pairs)

    def _plan_of(self, topk_idx: Tensor, topk_weights: Tensor) -> SendPlan:
        """Each pair of token and expert as a token of its own; their rows are still summed by token."""
        k = self._experts_per_token
        pairs = super()._plan_of(topk_idx.reshape(-1, 1), topk_weights.reshape(-1, 1))
        return replace(pairs, tokens=pairs.tokens // k, bag_start=pairs.bag_start[::k].contiguous())


class PlainGlooBaseline(GlooBaseline):
    """The same over gloo as it is usually written: new tensors every time, and `index_add_` in fp32."""

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        plan = self._plan = self._plan_of(topk_idx, topk_weights)
        self._sent = plan.counts.tolist()
        self._received = self._exchange_counts(plan.counts)
        rows = x.new_empty(sum(self._received), x.shape[1])
        meta = plan.meta.new_empty(sum(self._received), plan.meta.shape[1])
        dist.all_to_all_single(rows, x[plan.tokens], self._received, self._sent, group=self._group)
        dist.all_to_all_single(meta, plan.meta, self._received, self._sent, group=self._group)
        self.topk_idx = meta[:, : self.topk]
        self.topk_weights = meta[:, self.topk :].view(torch.float32)
        return rows

    def combine(self, y: Tensor) -> Tensor:
        if self._plan is None:
            raise RuntimeError("combine before any dispatch")
        back = y.new_empty(sum(self._sent), y.shape[1])
        dist.all_to_all_single(back, y, self._sent, self._received, group=self._group)
        out = torch.zeros(len(self._plan.bag_start), y.shape[1], device=y.device)
        return out.index_add_(0, self._plan.tokens, back.float()).to(y.dtype)
