"""Rows as they travel: as bytes, since dispatch only copies. Rows that commlib does not sum go as words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib.compat.deep_ep.errors import require
from commlib.compat.deep_ep.events import Work
from commlib.compat.deep_ep.layout import check_beside

SUMMED = (torch.bfloat16, torch.float16, torch.float32)  # dtypes of rows that combine takes
_WORD = torch.bfloat16  # of rows that are only copied
_UNIT = 16  # bytes: DeepEP's rows are a multiple of this
_SCALES = (torch.float32, torch.int32)
# DeepEP's "TMA-aligned": columns of scales begin at multiples of this many bytes.
_TMA_BYTES = 16

Rows = Tensor | tuple[Tensor, Tensor]


class Parcel(NamedTuple):
    """What is sent, and how to make DeepEP's result of what arrives: ``unpack(received, work, rows)``."""

    sent: Tensor  # [T, words]
    unpack: Callable[[Tensor, Work, int | None], Rows]


def pack(x: Any, column_major_scales: bool = False) -> Parcel:
    """Rows, or a pair of one-byte rows and scales, as one row of words for each token.

    Args:
        x: ``[T, H]`` of a dtype whose row is a multiple of 16 bytes; or a pair of ``[T, H]`` of a dtype of
            one byte and ``[T, S]`` float32 or int32. Any strides.
        column_major_scales: scales come out with stride 1 along rows, columns at multiples of 16 bytes.

    Raises:
        TypeError, Refused: it is neither.
    """
    if isinstance(x, tuple | list):
        require(len(x) == 2, f"x must be a tensor or a pair (rows, scales), got {len(x)} things")
        return _pack_pair(x[0], x[1], column_major_scales)
    _check_rows("x", x)
    if x.dtype in SUMMED:
        return Parcel(dense_rows(x), lambda received, work, rows: work.settled(received, rows))
    dtype = x.dtype

    def unpack(received: Tensor, work: Work, rows: int | None) -> Tensor:
        return work.settled(received.view(dtype), rows)

    return Parcel(dense_rows(x.contiguous()).view(_WORD), unpack)


def _pack_pair(x: Any, scales: Any, column_major: bool) -> Parcel:
    _check_rows("x[0]", x)
    check_beside(x, **{"x[1]": scales})
    require(x.element_size() == 1, f"x[0] with scales must have elements of one byte (e4m3), got {x.dtype}")
    require(scales.dtype in _SCALES, f"x[1], the scales, must be float32 or int32, got {scales.dtype}")
    tokens, hidden = x.shape
    require(
        scales.dim() == 2 and scales.shape[0] == tokens,
        f"x[1], the scales, must be [{tokens}, S], got {list(scales.shape)}",
    )
    end = hidden + 4 * scales.shape[1]
    row = torch.empty(tokens, -(-end // _UNIT) * _UNIT, dtype=torch.uint8, device=x.device)
    row[:, :hidden] = x.view(torch.uint8)
    row[:, hidden:end] = dense_rows(scales.contiguous()).view(torch.uint8)
    row[:, end:] = 0
    dtypes = (x.dtype, scales.dtype)

    def unpack(received: Tensor, work: Work, rows: int | None) -> tuple[Tensor, Tensor]:
        data = received.view(torch.uint8)
        values = work.settled(data[:, :hidden].view(dtypes[0]), rows)
        came = data[:, hidden:end].view(dtypes[1])
        out = _columns(came, len(came) if rows is None else rows) if column_major else None
        return values, work.settled(came, rows, out=out)

    return Parcel(row.view(_WORD), unpack)


def _columns(scales: Tensor, rows: int) -> Tensor:
    """Memory for scales with stride 1 along rows."""
    unit = _TMA_BYTES // scales.element_size()
    length = -(-rows // unit) * unit
    return scales.new_zeros(scales.shape[1], length)[:, :rows].t()


def _check_rows(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    require(x.dim() == 2, f"{name} must be [tokens, hidden], got {list(x.shape)}")
    size = x.shape[1] * x.element_size()
    require(
        size > 0 and size % _UNIT == 0,
        f"a row of {name} must be a multiple of {_UNIT} bytes, but {x.shape[1]} elements of {x.dtype} are "
        f"{size}",
    )


def dense_rows(x: Tensor) -> Tensor:
    """With the elements of a row side by side. A clone, since ``contiguous`` does not change strides where
    there is no second element that they lead to.
    """
    return x if x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)
