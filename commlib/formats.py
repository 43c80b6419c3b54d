"""Rows of other types and widths than the communicator's own, and scales beside them: bytes to the core."""

from __future__ import annotations

import torch
from torch import Tensor

from commlib import _core

# What the core can sum.
CORE_DTYPES = {
    torch.bfloat16: _core.DType.bf16,
    torch.float16: _core.DType.f16,
    torch.float32: _core.DType.f32,
    torch.float64: _core.DType.f64,
}
# Each has a number from 1, by which ranks tell each other what their rows are: append only.
_TYPES = (
    *("bfloat16", "float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"),
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "float4_e2m1fn_x2", "complex64", "complex128"),
)
_NUMBERS = {getattr(torch, name): n for n, name in enumerate(_TYPES, 1) if hasattr(torch, name)}
_SCALES_SHIFT = 8
OWN = _core.RowFormat()


def format_of(dtype: torch.dtype, hidden: int, rows: Tensor, scales: Tensor | None = None) -> _core.RowFormat:
    """What a core whose own rows are ``[n, hidden]`` of ``dtype`` is to know of these, and their scales.

    Raises:
        ValueError: a type that has no number here.
    """
    if scales is None and rows.dtype is dtype and rows.shape[1] == hidden:
        return OWN
    number = _number_of(rows)
    if scales is None:
        return _core.RowFormat(number, _row_bytes(rows))
    return _core.RowFormat(number | _number_of(scales) << _SCALES_SHIFT, _row_bytes(rows), _row_bytes(scales))


def can_be_summed(own: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether combine takes rows of ``dtype`` beside its own; others only travel, and have no gradient.

    Weights are of the type that sums are taken in, which float64 rows alone have otherwise.
    """
    return dtype in CORE_DTYPES and (dtype == torch.float64) == (own == torch.float64)


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
