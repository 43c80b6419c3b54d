"""Rows of other types and widths than the communicator's own, and scales beside them: bytes to the core."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from commlib import _core
from commlib.quantization import numbered

# What the core can sum.
CORE_DTYPES = {
    torch.bfloat16: _core.DType.bf16,
    torch.float16: _core.DType.f16,
    torch.float32: _core.DType.f32,
    torch.float64: _core.DType.f64,
}
# Each has a number from 1, by which ranks tell each other what their rows are.
_TYPES = _core.type_names()
_NUMBERS = {getattr(torch, name): n for n, name in enumerate(_TYPES, 1) if hasattr(torch, name)}
_SCALES_SHIFT = 8
OWN = _core.RowFormat()
_AS_THEY_ARE = _core.Conversion()


class Kind(NamedTuple):
    """What rows are, or the scales beside them."""

    dtype: torch.dtype
    width: int

    @property
    def bytes(self) -> int:
        """Of each."""
        return self.width * self.dtype.itemsize


class Sent(NamedTuple):
    """Rows as they travel, and what the core is to know of them."""

    rows: Kind
    scales: Kind | None = None
    format: _core.RowFormat = OWN
    conversion: _core.Conversion = _AS_THEY_ARE


def kinds_sent(rows: Tensor, scales: Tensor | None, quantize: int) -> tuple[Kind, Kind | None]:
    """What these rows and scales are as they travel. ``quantize``: the format's number, or 0."""
    hidden = rows.shape[1]
    if quantize:
        q = numbered(quantize)
        return Kind(q.row_dtype, hidden), Kind(q.scale_dtype, q.scales_of(hidden))
    return Kind(rows.dtype, hidden), None if scales is None else Kind(scales.dtype, scales.shape[1])


def sent_of(own: Sent, rows: Tensor, scales: Tensor | None = None, quantize: int = 0) -> Sent:
    """The same with what a core is to know of it, ``own`` being of its own rows.

    Raises:
        ValueError: a type that has no number here.
    """
    if scales is None and not quantize and rows.dtype is own.rows.dtype and rows.shape[1] == own.rows.width:
        return own
    kind, beside = kinds_sent(rows, scales, quantize)
    number = _number_of(kind)
    if beside is None:
        return Sent(kind, None, _core.RowFormat(number, kind.bytes))
    format = _core.RowFormat(number | _number_of(beside) << _SCALES_SHIFT, kind.bytes, beside.bytes)
    if not quantize:
        return Sent(kind, beside, format)
    to = _core.Quantization(quantize)
    return Sent(kind, beside, format, _core.Conversion(to, CORE_DTYPES[rows.dtype], kind.width))


def can_be_summed(own: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether combine takes rows of ``dtype`` beside its own; others only travel, and have no gradient.

    Weights are of the type that sums are taken in, which float64 rows alone have otherwise.
    """
    return dtype in CORE_DTYPES and (dtype == torch.float64) == (own == torch.float64)


def viewed(raw: Tensor, kind: Kind) -> Tensor:
    """``[n, bytes]`` uint8 as what lies there."""
    return raw if raw.dtype == kind.dtype else raw.view(kind.dtype)


def _number_of(kind: Kind) -> int:
    number = _NUMBERS.get(kind.dtype)
    if number is None:
        raise ValueError(f"rows and scales cannot be {kind.dtype}: view them as a type of the same size")
    return number
