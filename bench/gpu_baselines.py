"""Dispatch and combine on GPUs as they are written without commlib.

For in-process ranks on one GPU, plain PyTorch: gather, copies between the ranks' tensors, add. For ranks with
a GPU each, NCCL: through `torch.distributed` and through CuPy's raw binding. Other libraries for this are in
gpu_peers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from baselines import AllToAllBaseline, GlooBaseline, PlainGlooBaseline, SendPlan
from torch import Tensor

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


class PlainNcclBaseline(PlainGlooBaseline):
    """`torch.distributed.all_to_all_single` over NCCL as it is usually written: new tensors every time."""


class NcclBaseline(GlooBaseline):
    """The same as fast as we could write it: every large tensor allocated once, one `index_select` for all
    destinations, one `embedding_bag`; and the host waits once for the counts of both directions, while the
    GPU gathers rows."""

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        plan = self._plan = self._plan_of(topk_idx, topk_weights)
        counts = torch.stack([plan.counts, torch.empty_like(plan.counts)])
        dist.all_to_all_single(counts[1], counts[0], group=self._group)
        on_host = _OnHost(counts)
        torch.index_select(x, 0, plan.tokens, out=self._out_rows[: len(plan.tokens)])
        self._sent, self._received = on_host.tolist()
        return self._exchange_rows(self._start_meta(plan))


class _OnHost:
    """A small tensor on its way to the host, which need not wait for what the stream does after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)  # from a GPU to pinned memory
        self._written = torch.cuda.current_stream().record_event() if tensor.is_cuda else None

    def tolist(self) -> list[Any]:
        if self._written is not None:
            self._written.synchronize()
        return self._copy.tolist()


class CupyNcclBaseline(AllToAllBaseline):
    """Sends and receives in one group of CuPy's NCCL binding, without `torch.distributed`.

    Args:
        launch: the ranks; used once, to pass NCCL's id around.
        shape: as :class:`AllToAllBaseline`, without rank and ranks.
    """

    def __init__(self, launch: Any, **shape: Any) -> None:
        from cupy.cuda import nccl

        super().__init__(rank=launch.rank, ranks=launch.size, **shape)
        unique_id = launch.gather(nccl.get_unique_id() if launch.rank == 0 else None)[0]
        self._nccl = nccl
        self._comm = nccl.NcclCommunicator(launch.size, unique_id, launch.rank)

    def _exchange_counts(self, counts: Tensor) -> list[int]:
        received = torch.empty_like(counts)
        ones = [1] * self.ranks
        self._start(received.unsqueeze(1), counts.unsqueeze(1), ones, ones)
        return received.tolist()

    def _start(self, into: Tensor, source: Tensor, into_rows: list[int], rows: list[int]) -> Any:
        stream = torch.cuda.current_stream().cuda_stream
        row = source.shape[1] * source.element_size()
        send_from, receive_at = source.data_ptr(), into.data_ptr()
        self._nccl.groupStart()
        for peer in range(self.ranks):
            self._comm.send(send_from, rows[peer] * row, self._nccl.NCCL_UINT8, peer, stream)
            self._comm.recv(receive_at, into_rows[peer] * row, self._nccl.NCCL_UINT8, peer, stream)
            send_from += rows[peer] * row
            receive_at += into_rows[peer] * row
        self._nccl.groupEnd()
        return _InStreamOrder()


class _InStreamOrder:
    """An operation that the current stream waits for anyway."""

    def wait(self) -> None:
        pass
