"""Other libraries' dispatch and combine, for ranks with a GPU each; and why one cannot be had.

Each is called as its documentation says. Its requirements are checked only when it is asked for: none of them
is installed with commlib.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.harness.report import one_line
from bench.harness.turns import System
from bench.harness.workload import Job, Received, Shape
from bench.systems.all_to_all import AllToAllBaseline, Baseline

# Limits of all_to_all_vdev_2d and its way back; they give each split a block, and use at most VDEV_BLOCKS.
VDEV_MOST_RANKS = VDEV_MOST_PIECES = 16
VDEV_BLOCKS = 64


def why_no_cupy() -> str:
    """Why CuPy's NCCL cannot be used; empty if it can."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        return one_line(error)
    return "" if nccl.available else "CuPy finds no NCCL"


# -- PyTorch's symmetric memory ------------------------------------------------------------------------------


def why_no_symmetric_memory(ranks: int) -> str:
    """Why `all_to_all_vdev_2d` cannot be used; empty if it can."""
    try:
        import torch.distributed._symmetric_memory as symmetric
    except ImportError as error:
        return one_line(error)
    if not hasattr(torch.ops.symm_mem, "all_to_all_vdev_2d") or not hasattr(
        symmetric, "is_nvshmem_available"
    ):
        return f"torch {torch.__version__} has no all_to_all_vdev_2d"
    if not symmetric.is_nvshmem_available():
        return f"torch {torch.__version__} was built without NVSHMEM, or finds no libnvshmem_host.so.3"
    return "" if ranks <= VDEV_MOST_RANKS else f"it takes at most {VDEV_MOST_RANKS} ranks"


class VdevBaseline(AllToAllBaseline):
    """`torch.ops.symm_mem.all_to_all_vdev_2d` over NVSHMEM, and `_offset` for the way back.

    Split sizes stay on the GPU. The second dimension of the operation is meant for a rank's experts: a token
    would cross once for each of its experts. Here it crosses once to a rank, as with the other systems, and
    the second dimension divides what goes to a rank into equal pieces, since one thread block moves a split.
    So rows come by piece, then by source rank.

    Rows are gathered into symmetric memory, and experts write their output there (:class:`Vdev`): there are
    no needless copies. The host reads how many rows came, as it must to pass them on.

    A rank may write its send buffer, or tell others its splits, while another still works on the operation
    before. So each exchange has its own splits, and between two uses of a buffer lies an exchange of another:
    each begins with a barrier of all ranks on the GPU.

    Args:
        group: all ranks, the default group.
        shape: as :class:`AllToAllBaseline`, without rank and ranks.
    """

    def __init__(self, group: dist.ProcessGroup, **shape: Any) -> None:
        import torch.distributed._symmetric_memory as symmetric

        symmetric.set_backend("NVSHMEM")
        with warnings.catch_warnings():  # older releases need it, and newer ones deprecate it
            warnings.simplefilter("ignore", FutureWarning)
            symmetric.enable_symm_mem_for_group(group.group_name)
        self._symmetric, self._group = symmetric, group.group_name
        super().__init__(rank=group.rank(), ranks=group.size(), **shape)
        pieces = max(1, min(VDEV_MOST_PIECES, VDEV_BLOCKS // self.ranks))
        self._piece = torch.arange(pieces, device=self._device)
        splits = self.ranks * pieces
        self._out_meta = self._empty(*self._in_meta.shape, dtype=torch.int32)
        self._splits = self._empty(splits, dtype=torch.int64)
        # Rows of each split, and where it begins: [2, pieces * ranks]; on the way back [2, ranks * pieces].
        self._rows_at, self._meta_at, self._back_at = (
            self._empty(2, splits, dtype=torch.int64) for _ in range(3)
        )
        self._layout: list[list[int]] = []  # of the rows that came, on the host

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """As :class:`AllToAllBaseline`, but in the order of :meth:`order`."""
        plan = self._plan = self._plan_of(topk_idx, topk_weights)
        sent = len(plan.tokens)
        torch.index_select(x, 0, plan.tokens, out=self._out_rows[:sent])
        self._out_meta[:sent].copy_(plan.meta)
        pieces, counts = len(self._piece), plan.counts.unsqueeze(1)
        self._splits.copy_((counts // pieces + (self._piece < counts % pieces)).flatten())
        shuffle = torch.ops.symm_mem.all_to_all_vdev_2d
        shuffle(self._out_rows, self._in_rows, self._splits, self._rows_at, self._group)
        shuffle(self._out_meta, self._in_meta, self._splits, self._meta_at, self._group)
        self._layout = self._rows_at.tolist()
        return self._take(max(rows + begin for rows, begin in zip(*self._layout, strict=True)))

    def order(self) -> Tensor:
        """Where the rows of the last dispatch lie, by source rank, then by token ``[N]``."""
        by_source = torch.tensor(self._layout).view(2, -1, self.ranks).transpose(1, 2).flatten(1).tolist()
        parts = [torch.arange(begin, begin + rows) for rows, begin in zip(*by_source, strict=True)]
        return torch.cat(parts).to(self._device)

    def combine(self, y: Tensor) -> Tensor:
        assert self._plan is not None and y is self._in_rows
        shuffle_back = torch.ops.symm_mem.all_to_all_vdev_2d_offset
        shuffle_back(y, self._out_rows, self._rows_at, self._back_at, self._group)
        back = self._out_rows[: len(self._plan.tokens)]
        return torch.nn.functional.embedding_bag(self._plan.bag, back, self._plan.bag_start, mode="sum")

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        buffer = self._symmetric.empty(*shape, dtype=dtype, device=self._device)
        self._symmetric.rendezvous(buffer, self._group)
        return buffer

    def _exchange_counts(self, counts: Tensor) -> list[int]:
        raise NotImplementedError("the operation exchanges them")

    def _start(self, into: Tensor, source: Tensor, into_rows: list[int], rows: list[int]) -> Any:
        raise NotImplementedError("the split sizes are on the GPU")


class Vdev(Baseline):
    """The system over it. Its rows are put into the job's order to check them, and y into its own; neither is
    timed."""

    _transport: VdevBaseline

    def wrong_rows(self, job: Job, received: Received) -> list[str]:
        order = self._transport.order()
        parts = (received.rows, received.topk_idx, received.topk_weights)
        return job.wrong_rows(Received(*(part[order] for part in parts)))

    def place(self, job: Job) -> Tensor:
        return self._transport.output().index_copy_(0, self._transport.order(), job.y)


# -- DeepEP --------------------------------------------------------------------------------------------------


def why_no_deep_ep(shape: Shape, ranks: int) -> str:
    """Why DeepEP's normal mode cannot be used; empty if it can."""
    try:
        from deep_ep import Buffer
    except Exception as error:  # it loads libraries, and compiles: anything may fail
        return one_line(error)
    if shape.dtype != torch.bfloat16:
        return "its combine takes bf16 only"
    try:
        Buffer.get_dispatch_config(ranks)
    except AssertionError as error:
        return str(error) or f"it has no configuration for {ranks} ranks"
    return ""


class DeepEp(System):
    """`deep_ep.Buffer` in its normal mode, with the configurations that it recommends.

    The layout is part of a dispatch: it is DeepEP's plan.

    Args:
        name: the system's.
        group: the ranks; used to start only.
        shape: of the job.
        num_sms: SMs of its kernels, an even number; None: its own default.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, shape: Shape, num_sms: int | None) -> None:
        from deep_ep import Buffer

        if num_sms is not None:
            Buffer.set_num_sms(num_sms)
        ranks, row_bytes = group.size(), shape.hidden * shape.dtype.itemsize
        configs = (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks))
        self.name, self._experts, self.num_sms = name, shape.experts, Buffer.num_sms
        self._buffer = Buffer(
            group,
            max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs),
            max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs),
            explicitly_destroy=True,
        )
        self._handle: Any = None

    def dispatch(self, job: Job) -> Received:
        per_rank, per_node, per_expert, goes, _ = self._buffer.get_dispatch_layout(
            job.topk_idx, self._experts
        )
        rows, topk_idx, topk_weights, _, self._handle, _ = self._buffer.dispatch(
            job.x,
            topk_idx=job.topk_idx,
            topk_weights=job.topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=per_expert,
        )
        return Received(rows, topk_idx, topk_weights)

    def combine(self, y: Tensor) -> Tensor:
        return self._buffer.combine(y, self._handle)[0]

    def release(self) -> None:
        self._handle = None

    def close(self) -> None:
        """Give its buffers back. Called by all ranks."""
        self._buffer.destroy()
