"""Checks of the arguments of operations. All happen before anything is sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from commlib.arrays import as_tensor
from commlib.settings import Settings


def checked_rows(name: str, rows: Tensor, settings: Settings, count: int | None = None) -> Tensor:
    """Rows of the right dtype, device and shape: ``[count, hidden]``, or at most max_tokens of them."""
    if rows.dtype != settings.dtype:
        raise ValueError(f"{name} must be {settings.dtype}, got {rows.dtype}")
    _check_device(name, rows, settings.device)
    if rows.dim() != 2 or rows.shape[1] != settings.hidden:
        raise ValueError(f"{name} must be [rows, {settings.hidden}], got {list(rows.shape)}")
    if count is None:
        if rows.shape[0] > settings.max_tokens:
            raise ValueError(f"{name} has {rows.shape[0]} rows, but max_tokens is {settings.max_tokens}")
    elif rows.shape[0] != count:
        raise ValueError(f"{name} must have {count} rows, got {rows.shape[0]}")
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        raise ValueError(
            f"the elements of a row of {name} must lie side by side, but its strides are "
            f"{rows.stride()}: call .contiguous()"
        )
    return rows


def checked_topk_idx(topk_idx: Any, tokens: int, settings: Settings) -> Tensor:
    """Expert ids as contiguous int64 ``[tokens, topk]``. Their range is checked in the core."""
    if topk_idx is None:
        raise ValueError("topk_idx is needed unless a handle is given")
    idx = as_tensor("topk_idx", topk_idx)
    if idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_idx must be int64 or int32, got {idx.dtype}")
    _check_device("topk_idx", idx, settings.device)
    topk = settings.topk
    if tuple(idx.shape) != (tokens, topk):
        raise ValueError(f"topk_idx must be [{tokens}, {topk}] as x and topk say, got {list(idx.shape)}")
    return idx.to(torch.int64).contiguous()


def checked_weights(name: str, weights: Tensor, shape: tuple[int, ...], settings: Settings) -> Tensor:
    """Weights of the right dtype, device and shape, contiguous."""
    if weights.dtype != settings.weight_dtype:
        raise ValueError(f"{name} must be {settings.weight_dtype}, got {weights.dtype}")
    _check_device(name, weights, settings.device)
    if tuple(weights.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(weights.shape)}")
    return weights.contiguous()


def checked_out(out: Tensor, tokens: int, settings: Settings) -> Tensor:
    """A place for combine's result."""
    checked_rows("out", out, settings, tokens)
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    return out


def check_no_grad(*inputs: Tensor | None) -> None:
    """``out=`` writes past autograd, so nothing may need a gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ValueError("out= is not differentiable: leave it out, or use torch.no_grad()")


def check_layout(layout: str, align: int, zero_copy: bool, overflow: str) -> None:
    """Options of dispatch that go together."""
    if layout not in ("rank", "expert"):
        raise ValueError(f'layout must be "rank" or "expert", got {layout!r}')
    if not isinstance(align, int) or align < 1:
        raise ValueError(f"align must be a positive int, got {align!r}")
    if overflow not in ("error", "drop"):
        raise ValueError(f'overflow must be "error" or "drop", got {overflow!r}')
    if zero_copy and layout == "expert":
        raise ValueError('zero_copy needs layout "rank": rows grouped by expert are copies')


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        where = "the CPU" if device.type == "cpu" else str(device)
        raise ValueError(f"{name} must be on {where}, as this communicator is, got {tensor.device}")
