"""Matrix product of row groups, each with its own weight matrix; torch.compile traces it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from commlib import checks
from commlib.ops.calling import is_traced

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_KERNEL_BYTES = 16  # torch's kernel needs row strides that are a multiple of this


def grouped_mm(
    x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Multiply the rows of group ``e`` by ``w[e]``, and add ``bias[e]``.

    On a GPU it runs :func:`torch.nn.functional.grouped_mm` for bfloat16, float16 and float32 whose rows are
    a multiple of 16 bytes. For the rest, and on a CPU, it loops over the groups.

    Under ``torch.autocast`` both are cast first, as :class:`torch.nn.Linear` casts its input and weight.

    Args:
        x: ``[M, H]``, rows of group e at ``offsets[e]:offsets[e + 1]``. Rows from ``offsets[-1]`` on, as a
            bounded dispatch has them, are not read, and undefined in the result and its gradients.
        w: ``[G, H, F]``, same dtype (but for autocast) and device as ``x``.
        offsets: ``[G + 1]`` integers, from 0, not decreasing: ``Dispatched.offsets``.
        bias: ``[G, F]``, any float dtype, added in that of the product.
        out: ``[M, F]``, memory for the result, as :meth:`commlib.ExpertParallel.combine_buffer` lends it: of
            the result's dtype, apart from the other arguments'. It does not require grad; the result,
            another tensor of the same memory, does if ``x`` or ``w`` do. On a GPU the product is copied
            there, and so it is by torch.compile, whose result is a tensor of its own.

    Returns:
        ``[M, F]``, dtype of ``x``, or autocast's; differentiable once in ``x``, ``w`` and ``bias``.

    Raises:
        ValueError: shapes that do not fit each other; on a CPU, offsets past the rows; ``out`` of another
            dtype or device, one that requires grad, or one that shares memory with what is read.
        TypeError: ``x`` and ``w`` of different dtypes.
    """
    x, w = checked_operands(x, w, offsets, bias)
    if out is None:
        return with_bias(product(x, w, offsets), bias, offsets)
    _check_out(out, x, w, bias)
    if writes_in_place(x, w):
        return with_bias(_ProductInto.apply(x, w, offsets, (out,)), bias, offsets)
    rows = with_bias(product(x, w, offsets), bias, offsets)
    if torch.compiler.is_compiling():  # a copy into an input has no gradient there
        out.copy_(rows.detach())
        return rows
    return out.detach().copy_(rows)


def checked_operands(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x`` and ``w`` as they are multiplied. Raises as :func:`grouped_mm` does."""
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
    return x, w


def _check_out(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    shape = (x.shape[0], w.shape[2])
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be {list(shape)} of {x.dtype} on {x.device}, got {list(out.shape)} of {out.dtype} on "
            f"{out.device}"
        )
    if out.requires_grad:
        raise ValueError("out must not require grad: it is written to")
    if not is_traced(out, x, w):
        checks.check_apart(out, {"x": x, "w": w, "bias": bias})


def with_bias(rows: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Add its group's bias, of ``[G, F]``, to each row of a product, in place."""
    return rows if bias is None else rows.add_(rows_of_groups(bias, offsets, rows))


def rows_of_groups(bias: Tensor, offsets: Tensor, like: Tensor) -> Tensor:
    """The bias of each row, ``[M, F]``; 0 behind the last group."""
    sizes = torch.cat([offsets, offsets.new_full((1,), like.shape[0])]).diff()
    padded = F.pad(bias.to(like.dtype), (0, 0, 0, 1))
    return padded.repeat_interleave(sizes, dim=0, output_size=like.shape[0])


def autocast_dtype(t: Tensor) -> torch.dtype:
    """The dtype to which torch's own layers cast ``t``: autocast's, where it is on; float64 stays."""
    kind = t.device.type
    if t.is_floating_point() and t.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return t.dtype


def writes_in_place(*read: Tensor) -> bool:
    """Whether products of these can be written to memory that is there.

    torch's kernel for GPUs cannot. What traces a product sees one op, and so does a mode of dispatch, as
    selective checkpointing is.
    """
    return read[0].device.type == "cpu" and not is_traced(*read)


# Ops of our own, because torch's cannot be used directly: its fake kernel takes only bfloat16, so
# float32 does not compile, and its backward rejects an expanded gradient (`out.sum().backward()`).


@torch.library.custom_op("commlib::grouped_mm", mutates_args=())
def product(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    if _has_kernel(x, w.shape[1], w.shape[2]):
        return F.grouped_mm(_row_major(x), w, offs=offsets[1:].to(torch.int32))
    out = x.new_empty(x.shape[0], w.shape[2])
    multiply_into(out, x, w, offsets)
    return out


@torch.library.custom_op("commlib::grouped_mm_weight_grad", mutates_args=())
def weight_grad(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """``x[rows of e].T @ grad[rows of e]`` for each group e: ``[G, H, F]``."""
    if _has_kernel(x, x.shape[1], grad.shape[1]):
        offs = offsets[1:].to(torch.int32)
        return F.grouped_mm(_row_major(x).mT, _row_major(grad), offs=offs)
    out = x.new_empty(offsets.shape[0] - 1, x.shape[1], grad.shape[1])
    for (a, b), of_group in zip(_groups(offsets, x), out, strict=True):
        torch.mm(x[a:b].mT, grad[a:b], out=of_group)
    return out


def multiply_into(out: Tensor, x: Tensor, w: Tensor, offsets: Tensor, *, add: bool = False) -> None:
    """The product, group by group: written to ``out``, or added to it."""
    for (a, b), weight in zip(_groups(offsets, x), w, strict=True):
        if a == b:
            continue
        if add:
            out[a:b].addmm_(x[a:b], weight)
        else:
            torch.mm(x[a:b], weight, out=out[a:b])


def _groups(offsets: Tensor, x: Tensor) -> list[tuple[int, int]]:
    bounds = offsets.tolist()
    groups = list(pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] > x.shape[0] or any(a > b for a, b in groups):
        raise ValueError(f"offsets must go from 0 up, at most to the {x.shape[0]} rows of x, got {bounds}")
    return groups


@product.register_fake
def _(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@weight_grad.register_fake
def _(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, offsets = ctx.saved_tensors
    need_x, need_w, *_ = ctx.needs_input_grad
    return (
        product(grad, w.mT, offsets) if need_x else None,
        weight_grad(x, grad, offsets) if need_w else None,
        None,
    )


product.register_autograd(_backward, setup_context=_setup_context)


class _ProductInto(Function):
    """The product, in memory that is there: of a tuple, since autograd has nothing to know of the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, offsets: Tensor, memory: tuple[Tensor]) -> Tensor:
        ctx.save_for_backward(x, w, offsets)
        out = memory[0].detach()
        multiply_into(out, x, w, offsets)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_backward(ctx, grad), None


def _has_kernel(x: Tensor, *sizes: int) -> bool:
    """Whether torch's is used. On a CPU it is a loop, too, and slower for float32."""
    aligned = all(size * x.dtype.itemsize % _KERNEL_BYTES == 0 for size in sizes)
    return x.device.type != "cpu" and aligned and x.dtype in _KERNEL_DTYPES and hasattr(F, "grouped_mm")


def _row_major(t: Tensor) -> Tensor:
    # Not `contiguous()`: it keeps whatever strides a tensor of at most one row has, and the kernel
    # rejects some of them.
    if t.stride() == (t.shape[1], 1):
        return t
    return t.clone(memory_format=torch.contiguous_format)
