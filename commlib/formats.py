"""Rows of other types and widths than the communicator's own, and scales beside them: bytes to the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from commlib import _core
from commlib.settings import CORE_DTYPES

if TYPE_CHECKING:
    from commlib.settings import Settings

# Each has a number from 1, by which ranks tell each other what their rows are: append only.
_TYPES = (
    *("bfloat16", "float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"),
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "float4_e2m1fn_x2", "complex64", "complex128"),
)
_NUMBERS = {getattr(torch, name): n for n, name in enumerate(_TYPES, 1) if hasattr(torch, name)}
_SCALES_SHIFT = 8
OWN = _core.RowFormat()


def format_of(settings: Settings, rows: Tensor, scales: Tensor | None = None) -> _core.RowFormat:
    """What the core is to know of ``rows [n, width]`` and ``scales [n, s]``.

    Raises:
        ValueError: a type that has no number here.
    """
    if scales is None and rows.dtype is settings.dtype and rows.shape[1] == settings.hidden:
        return OWN
    number = _number_of(rows)
    if scales is None:
        return _core.RowFormat(number, _row_bytes(rows))
    return _core.RowFormat(number | _number_of(scales) << _SCALES_SHIFT, _row_bytes(rows), _row_bytes(scales))


def can_be_summed(settings: Settings, dtype: torch.dtype) -> bool:
    """Whether combine takes rows of this type; others only travel, and have no gradient.

    Weights are of the type that sums are taken in, which float64 rows alone have otherwise.
    """
    return dtype in CORE_DTYPES and (dtype == torch.float64) == (settings.dtype == torch.float64)


def viewed(raw: Tensor, like: Tensor) -> Tensor:
    """``[n, bytes]`` uint8 as rows of the type and width of ``like``."""
    return raw if raw.dtype == like.dtype else raw.view(like.dtype)


def _number_of(rows: Tensor) -> int:
    number = _NUMBERS.get(rows.dtype)
    if number is None:
        raise ValueError(f"rows and scales cannot be {rows.dtype}: view them as a type of the same size")
    return number


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1] * rows.element_size()
