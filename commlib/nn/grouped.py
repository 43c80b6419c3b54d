"""Matrix product of row groups, each with its own weight matrix; torch.compile traces it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_KERNEL_BYTES = 16  # torch's kernel needs row strides that are a multiple of this


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the rows of group ``e`` by ``w[e]``, and add ``bias[e]``.

    Runs :func:`torch.nn.functional.grouped_mm` for bfloat16, float16 and float32 whose rows are a
    multiple of 16 bytes, and a loop over the groups for the rest (float64, odd sizes).

    Under ``torch.autocast`` both are cast first, as :class:`torch.nn.Linear` casts its input and weight.

    Args:
        x: ``[M, H]``, rows of group e at ``offsets[e]:offsets[e + 1]``; ``M == offsets[-1]``.
        w: ``[G, H, F]``, same dtype (but for autocast) and device as ``x``.
        offsets: ``[G + 1]`` integers, from 0, not decreasing: ``Dispatched.offsets``.
        bias: ``[G, F]``, any float dtype, added in that of the product.

    Returns:
        ``[M, F]``, dtype of ``x``, or autocast's; differentiable once in ``x``, ``w`` and ``bias``.

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: ``x`` and ``w`` of different dtypes.
    """
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x must be [M, H] and w [G, H, F], got {tuple(x.shape)} and {tuple(w.shape)}")
    if offsets.dim() != 1 or offsets.shape[0] != w.shape[0] + 1:
        raise ValueError(f"offsets must be [{w.shape[0] + 1}], got {tuple(offsets.shape)}")
    if bias is not None and bias.shape != (w.shape[0], w.shape[2]):
        raise ValueError(f"bias must be [{w.shape[0]}, {w.shape[2]}], got {tuple(bias.shape)}")
    x, w = x.to(autocast_dtype(x)), w.to(autocast_dtype(w))
    if x.dtype != w.dtype:
        raise TypeError(
            f"x is {x.dtype}, w is {w.dtype}: convert one, or run under torch.autocast({x.device.type!r})"
        )
    out = _grouped_mm(x, w, offsets)
    if bias is None:
        return out
    return out + bias.to(out.dtype).repeat_interleave(offsets.diff(), dim=0, output_size=out.shape[0])


def autocast_dtype(t: Tensor) -> torch.dtype:
    """The dtype to which torch's own layers cast ``t``: autocast's, where it is on; float64 stays."""
    kind = t.device.type
    if t.is_floating_point() and t.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return t.dtype


# Ops of our own, because torch's cannot be used directly: its fake kernel takes only bfloat16, so
# float32 does not compile, and its backward rejects an expanded gradient (`out.sum().backward()`).


@torch.library.custom_op("commlib::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    if _has_kernel(x.dtype, w.shape[1], w.shape[2]):
        return F.grouped_mm(_row_major(x), w, offs=offsets[1:].to(torch.int32))
    out = x.new_empty(x.shape[0], w.shape[2])
    for (a, b), weight in zip(pairwise(offsets.tolist()), w, strict=True):
        torch.mm(x[a:b], weight, out=out[a:b])
    return out


@torch.library.custom_op("commlib::grouped_mm_weight_grad", mutates_args=())
def _weight_grad(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """``x[rows of e].T @ grad[rows of e]`` for each group e: ``[G, H, F]``."""
    if _has_kernel(x.dtype, x.shape[1], grad.shape[1]):
        offs = offsets[1:].to(torch.int32)
        return F.grouped_mm(_row_major(x).mT, _row_major(grad), offs=offs)
    out = x.new_empty(offsets.shape[0] - 1, x.shape[1], grad.shape[1])
    for (a, b), weight_grad in zip(pairwise(offsets.tolist()), out, strict=True):
        torch.mm(x[a:b].mT, grad[a:b], out=weight_grad)
    return out


@_grouped_mm.register_fake
def _(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, offsets = ctx.saved_tensors
    need_x, need_w, _ = ctx.needs_input_grad
    return (
        _grouped_mm(grad, w.mT, offsets) if need_x else None,
        _weight_grad(x, grad, offsets) if need_w else None,
        None,
    )


_grouped_mm.register_autograd(_backward, setup_context=_setup_context)


def _has_kernel(dtype: torch.dtype, *sizes: int) -> bool:
    aligned = all(size * dtype.itemsize % _KERNEL_BYTES == 0 for size in sizes)
    return aligned and dtype in _KERNEL_DTYPES and hasattr(F, "grouped_mm")


def _row_major(t: Tensor) -> Tensor:
    # Not `contiguous()`: it keeps whatever strides a tensor of at most one row has, and the kernel
    # rejects some of them.
    if t.stride() == (t.shape[1], 1):
        return t
    return t.clone(memory_format=torch.contiguous_format)
