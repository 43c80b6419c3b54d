"""Rows of few bits: the formats that dispatch converts rows to, and the same conversion in plain PyTorch."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from commlib import _core
from commlib.arguments import shown

QuantFormat = Literal["fp8_e4m3", "fp8_e4m3_ue8m0", "mxfp8", "int8"]
FORMATS: tuple[QuantFormat, ...] = get_args(QuantFormat)
SOURCES = (torch.bfloat16, torch.float16, torch.float32)
LEAST = 1e-4  # for which a block's greatest magnitude is taken where it is less


class Quantization(NamedTuple):
    """A format: what becomes of a row.

    Attributes:
        name: as users say it.
        number: as the core does.
        rows: the type of elements; a name, since an older PyTorch may lack it.
        scales: that of scales: float32, or a power of two in one byte.
        most: the greatest number of the first.
        block: elements for each scale; 0: the whole row.
    """

    name: QuantFormat
    number: int
    rows: str
    scales: str
    most: float
    block: int

    @property
    def row_dtype(self) -> torch.dtype:
        """The type of elements."""
        return getattr(torch, self.rows)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The type of scales."""
        return getattr(torch, self.scales)

    @property
    def has_powers(self) -> bool:
        """Whether scales are powers of two."""
        return self.scales != "float32"

    def scales_of(self, hidden: int) -> int:
        """How many scales a row has."""
        return hidden // self.block if self.block else 1


def _known(name: QuantFormat, rows: str, scales: str, most: float, block: int) -> Quantization:
    return Quantization(name, int(getattr(_core.Quantization, name)), rows, scales, most, block)


_ALL = (
    _known("fp8_e4m3", "float8_e4m3fn", "float32", 448.0, 128),
    _known("fp8_e4m3_ue8m0", "float8_e4m3fn", "float8_e8m0fnu", 448.0, 128),
    _known("mxfp8", "float8_e4m3fn", "float8_e8m0fnu", 448.0, 32),
    _known("int8", "int8", "float32", 127.0, 0),
)
_BY_NAME = {q.name: q for q in _ALL}
_BY_NUMBER = {q.number: q for q in _ALL}


def named(name: str) -> Quantization:
    """The format that users call so.

    Raises:
        ValueError: there is none of that name, or this PyTorch lacks its types.
    """
    q = _BY_NAME.get(name) if isinstance(name, str) else None  # type: ignore[call-overload]
    if q is None:
        known = ", ".join(f'"{f}"' for f in FORMATS)
        raise ValueError(f"there is no format {shown(name)} to quantize to; there are {known}")
    for dtype in (q.rows, q.scales):
        if not hasattr(torch, dtype):
            raise ValueError(f'format "{name}" needs torch.{dtype}, which PyTorch {torch.__version__} lacks')
    return q


def numbered(number: int) -> Quantization:
    """The format that the core calls so. Raises ValueError where there is none."""
    q = _BY_NUMBER.get(number)
    if q is None:
        raise ValueError(f"there is no format number {number}")
    return q


def check_quantizable(q: Quantization, x: Tensor) -> None:
    """That rows have a type and a width that can be converted.

    Raises:
        ValueError: they have not.
    """
    if x.dtype not in SOURCES:
        raise ValueError(f"x must be bfloat16, float16 or float32 to be quantized, got {x.dtype}")
    hidden = x.shape[-1]
    if hidden > 0 and hidden % (q.block or 1) == 0:
        return
    fit = [f'"{other.name}"' for other in _ALL if hidden > 0 and hidden % (other.block or 1) == 0]
    which = f"; {' and '.join(fit)} would do" if fit else ""
    raise ValueError(
        f'quantize="{q.name}" needs rows of a multiple of {q.block or 1} elements, got {hidden}{which}'
    )


def quantize(x: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Rows of few bits, and the scales that undo it: ``rows * scales`` is about ``x``.

    What ``dispatch(x, ..., quantize=format)`` does on the way, in plain PyTorch and with the same bits. A
    block of a row becomes ``x * (most / greatest)``, rounded to nearest even, with the scale
    ``greatest / most``: ``greatest`` is the block's greatest magnitude, 1e-4 at least; ``most`` that of the
    format. A block with a NaN or an infinity comes back as NaN throughout. Not differentiable.

    Args:
        x: ``[..., H]`` bfloat16, float16 or float32.
        format: "fp8_e4m3": blocks of 128, scales in float32. "fp8_e4m3_ue8m0": the same, scales rounded up to
            powers of two (float8_e8m0fnu). "mxfp8": blocks of 32, scales as before. "int8": one float32 scale
            for each row.

    Returns:
        ``(rows [..., H], scales [..., S])``: float8_e4m3fn or int8, and S = H/128, H/32 or 1 scales.

    Raises:
        ValueError: no such format, or an ``x`` that cannot be converted to it.
    """
    q = named(format)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension to be quantized")
    check_quantizable(q, x)
    blocks = x.detach().float().unflatten(-1, (q.scales_of(x.shape[-1]), -1))
    greatest = blocks.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    most = torch.full_like(greatest, q.most)  # a tensor: by a number, a GPU multiplies with its inverse
    scales, factors = _scales(q, greatest, most)
    scaled = blocks * factors
    if q.rows == "int8":
        rows = torch.where(scaled.isnan(), 0, scaled.round())
    else:
        rows = torch.where(scaled.isnan(), torch.nan, scaled)  # one NaN: not as each processor makes it
    return rows.to(q.row_dtype).flatten(-2), scales.squeeze(-1)


def _scales(q: Quantization, greatest: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """What is stored beside blocks, and what they are multiplied by."""
    scales = greatest / most
    if not q.has_powers:
        return torch.where(scales.isnan(), torch.nan, scales), most / greatest
    exponents = (scales.view(torch.int32).to(torch.int64) + 0x7FFFFF >> 23).clamp(max=255)  # rounded up
    factors = (254 - exponents << 23).to(torch.int32).view(torch.float32)
    factors = torch.where(exponents == 255, torch.nan, factors)
    return exponents.to(torch.uint8).view(q.scale_dtype), factors


def dequantize(rows: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``rows`` times their ``scales``, in float32, rounded to ``dtype``.

    Args:
        rows: ``[..., H]`` of any type that float32 holds, as ``Dispatched.x``.
        scales: ``[..., S]`` of the same shape but for the last: each is of H/S elements in a row.
        dtype: of the result.

    Raises:
        ValueError: shapes that do not go together.
    """
    rows, scales = torch.as_tensor(rows), torch.as_tensor(scales)
    alike = rows.dim() == scales.dim() > 0 and rows.shape[:-1] == scales.shape[:-1]
    if not alike or scales.shape[-1] == 0 or rows.shape[-1] % scales.shape[-1]:
        raise ValueError(
            f"scales must be [..., S] where rows are [..., H], S a divisor of H, got "
            f"{list(scales.shape)} and {list(rows.shape)}"
        )
    blocks = rows.float().unflatten(-1, (scales.shape[-1], rows.shape[-1] // scales.shape[-1]))
    return (blocks * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)
