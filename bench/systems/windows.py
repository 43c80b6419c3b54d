"""Dispatch and combine through MPI's shared windows: the best that we could write with MPI on one node.

A rank gathers each row once, straight into the memory of the rank that wants it, and sums rows from the
memory of the ranks that made them: nothing is sent, and nothing is copied in between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness.launch import Launch
from bench.harness.workload import Job
from bench.systems.all_to_all import AllToAllBaseline, Baseline, SendPlan


def why_no_windows(launch: Launch) -> str:
    """Why ranks cannot have windows in each other's memory; empty if they can. Called by all ranks."""
    if launch.comm is None:
        return launch.no_mpi
    from mpi4py import MPI

    beside = launch.comm.Split_type(MPI.COMM_TYPE_SHARED)
    size = beside.size
    beside.Free()
    return "" if size == launch.size else "ranks on several hosts share no memory"


class SharedRows:
    """A shared window with a block of rows for each rank.

    Attributes:
        rows: ``[ranks * most, columns]``, the blocks of all ranks in order of rank, the same on all of them.
    """

    def __init__(self, comm: Any, most: int, columns: int, dtype: torch.dtype) -> None:
        from mpi4py import MPI

        num_bytes = most * columns * dtype.itemsize
        self._window = MPI.Win.Allocate_shared(num_bytes, 1, comm=comm)
        self._window.Lock_all()
        first, _ = self._window.Shared_query(0)  # the others' blocks follow: MPI makes them contiguous
        memory = MPI.memory.fromaddress(first.address, comm.size * num_bytes)
        self.rows = torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(-1, columns)

    def sync(self) -> None:
        """Order this rank's reads and writes of the window with what comes next."""
        self._window.Sync()

    def close(self) -> None:
        """Give the memory back. Called by all ranks."""
        self._window.Unlock_all()
        self._window.Free()


def meet(comm: Any, *written: SharedRows) -> None:
    """All ranks see what all have written."""
    for window in written:
        window.sync()
    comm.Barrier()
    for window in written:
        window.sync()


class WindowsBaseline(AllToAllBaseline):
    """The same dispatch and combine, where rows and sums go through windows that all ranks share.

    Ranks meet once in each operation after they have written and before they read. A block is written again
    only when all ranks have begun the next dispatch, which its Allgather sees to: so they have read what they
    wanted, and there is one combine for each dispatch.

    Args:
        comm: mpi4py communicator of ranks on one host.
        shape: as :class:`AllToAllBaseline`, without rank and ranks.
    """

    def __init__(self, comm: Any, **shape: Any) -> None:
        self._comm = comm
        self._windows: list[SharedRows] = []
        super().__init__(rank=comm.rank, ranks=comm.size, **shape)
        # The base class's three buffers, here this rank's blocks. A rank's sums wait in `_out_rows`.
        self._all_sums, self._all_rows, self._all_meta = (window.rows for window in self._windows)
        self._most = len(self._in_rows)
        self._counts = np.zeros((comm.size, comm.size), np.int64)  # [source, destination]
        self._first_rows = torch.arange(comm.size) * self._most  # [R] where each rank's block begins
        self._bag = torch.empty(0, dtype=torch.int64)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """As :class:`AllToAllBaseline`: rows received ``[N, H]``, a view, valid until the next dispatch."""
        plan = self._plan = self._plan_of(topk_idx, topk_weights)
        self._comm.Allgather(plan.counts.numpy(), self._counts)
        begins, places = self._places(plan)
        tokens = plan.tokens.split(plan.counts.tolist())
        for begin, mine in zip(begins.tolist(), tokens, strict=True):
            torch.index_select(x, 0, mine, out=self._all_rows[begin : begin + len(mine)])
        self._all_meta.index_copy_(0, places, plan.meta)
        self._bag = places[plan.bag]
        meet(self._comm, *self._windows[1:])
        return self._take(int(self._counts[:, self.rank].sum()))

    def output(self) -> Tensor:
        """Memory for y, which the other ranks read: ``[ranks * max_tokens, H]``, this rank's block."""
        return self._out_rows

    def combine(self, y: Tensor) -> Tensor:
        """As :class:`AllToAllBaseline`; copies y unless it is the first rows of :meth:`output`."""
        if self._plan is None:
            raise RuntimeError("combine before any dispatch")
        if y.data_ptr() != self._out_rows.data_ptr():
            self._out_rows[: len(y)].copy_(y)
        meet(self._comm, self._windows[0])
        return torch.nn.functional.embedding_bag(self._bag, self._all_sums, self._plan.bag_start, mode="sum")

    def close(self) -> None:
        """Give the windows back. Called by all ranks."""
        for window in self._windows:
            window.close()

    def _places(self, plan: SendPlan) -> tuple[Tensor, Tensor]:
        """Where this rank's rows for each rank begin ``[R]``, and each row's place ``[S]``, in all blocks."""
        from_lower_ranks = torch.from_numpy(self._counts[: self.rank].sum(0))
        begins = self._first_rows + from_lower_ranks
        sent_before = plan.counts.cumsum(0) - plan.counts
        moved = (begins - sent_before).repeat_interleave(plan.counts, output_size=len(plan.tokens))
        return begins, torch.arange(len(plan.tokens)) + moved

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        most, columns = shape
        window = SharedRows(self._comm, most, columns, dtype)
        self._windows.append(window)
        return window.rows[self.rank * most : (self.rank + 1) * most]

    def _exchange_counts(self, counts: Tensor) -> list[int]:
        raise NotImplementedError("ranks gather all counts")

    def _start(self, into: Tensor, source: Tensor, into_rows: list[int], rows: list[int]) -> Any:
        raise NotImplementedError("nothing is sent")


class Windows(Baseline):
    """The system over it: experts write y where other ranks read it."""

    _transport: WindowsBaseline

    def place(self, job: Job) -> Tensor:
        return self._transport.output()[: len(job.y)].copy_(job.y)
