"""The all-to-all over MPI."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.systems.all_to_all import AllToAllBaseline


class RowTypes:
    """MPI's datatypes for rows: where an element is a row, no count can exceed an int32."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def __call__(self, num_bytes: int) -> Any:
        if num_bytes not in self._made:
            from mpi4py import MPI

            self._made[num_bytes] = MPI.BYTE.Create_contiguous(num_bytes).Commit()
        return self._made[num_bytes]


class MpiBaseline(AllToAllBaseline):
    """mpi4py's `Ialltoallv`; one element is a row, so that no count can exceed an int32."""

    def __init__(self, comm: Any, **shape: Any) -> None:
        super().__init__(rank=comm.rank, ranks=comm.size, **shape)
        self._comm = comm
        self._row_type = RowTypes()

    def _exchange_counts(self, counts: Tensor) -> list[int]:
        received = torch.empty_like(counts)
        self._comm.Alltoall(counts.numpy(), received.numpy())
        return received.tolist()

    def _start(self, into: Tensor, source: Tensor, into_rows: list[int], rows: list[int]) -> Any:
        row = self._row_type(source.shape[1] * source.element_size())
        return self._comm.Ialltoallv(
            [source.view(torch.uint8).numpy(), rows, row],
            [into.view(torch.uint8).numpy(), into_rows, row],
        )
