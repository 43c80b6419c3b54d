"""The all-to-all over NCCL, for ranks with a GPU each: by `torch.distributed`, and by CuPy's raw binding."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.systems.all_to_all import AllToAllBaseline
from bench.systems.gloo import GlooBaseline, PlainGlooBaseline


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
