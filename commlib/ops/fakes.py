"""Shapes of what the ops return, for torch.compile: how many rows arrive is known only at run time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from commlib.calls import Combine, Dispatch, Redispatch, words_of_groups
from commlib.communicator import refuse_forward_mode
from commlib.formats import kinds_sent
from commlib.ops.schema import unflat


def nothing(like: Tensor) -> Tensor:
    """In place of a result that there is not."""
    return like.new_empty(0, dtype=torch.float32)


def _weights(given: Tensor | None, size: Any, grouped: bool, topk: int, x: Tensor) -> Tensor:
    if given is None:
        return nothing(x)
    return given.new_empty((size,) if grouped else (size, topk))


def _rows_and_scales(call: Dispatch | Redispatch, size: Any) -> tuple[Tensor, Tensor]:
    x = call.x
    rows, scales = kinds_sent(x, call.scales, call.quantize)
    beside = nothing(x) if scales is None else x.new_empty(size, scales.width, dtype=scales.dtype)
    return x.new_empty(size, rows.width, dtype=rows.dtype), beside


def dispatch(*arguments: Any) -> tuple[Tensor, ...]:
    refuse_forward_mode()
    call = Dispatch(*arguments)
    groups = words_of_groups(call.experts, call.grouped)
    unique: Any
    size: Any
    if call.bounded:
        unique, size, groups = call.capacity, call.results, groups + 2
    else:
        context = torch.library.get_ctx()
        unique = context.new_dynamic_size()
        size = context.new_dynamic_size() if call.grouped else unique
    x, idx = call.x, call.topk_idx
    tokens, topk = idx.shape
    rows, scales = _rows_and_scales(call, size)
    return (
        rows,
        _weights(call.topk_weights, size, call.grouped, topk, x),
        idx.new_empty(groups),
        idx.new_empty(tokens, call.width),
        idx.new_empty(unique, topk),
        idx.new_empty(size, 2),
        idx.new_empty(groups),
        idx.new_empty(tokens, topk) if call.grouped else nothing(x),
        scales,
    )


def redispatch(*arguments: Any) -> tuple[Tensor, ...]:
    refuse_forward_mode()
    call = unflat(Redispatch, arguments)
    x, size, topk = call.x, call.plan.source.shape[0], call.plan.topk_idx.shape[1]
    weights = _weights(call.topk_weights, size, call.grouped, topk, x)
    dots = nothing(x) if call.y_weights is None else call.y_weights.new_empty(size)
    rows, scales = _rows_and_scales(call, size)
    return rows, weights, scales, dots


def combine(*arguments: Any) -> tuple[Tensor, Tensor]:
    refuse_forward_mode()
    call = unflat(Combine, arguments)
    y, idx = call.y, call.plan.topk_idx
    back = nothing(y) if call.weight_grads is None else call.weight_grads.new_empty(idx.shape)
    return y.new_empty(idx.shape[0], y.shape[1]), back
