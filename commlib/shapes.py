"""Shapes of what the ops return, for torch.compile: how many rows arrive is known only at run time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from commlib.communicator import refuse_forward_mode


def _weights(given: Tensor | None, size: Any, grouped: bool, topk: int, x: Tensor) -> Tensor:
    if given is None:
        return x.new_empty(0, dtype=torch.float32)
    return given.new_empty((size,) if grouped else (size, topk))


def _scales(given: Tensor | None, size: Any, x: Tensor) -> Tensor:
    if given is None:
        return x.new_empty(0, dtype=torch.float32)
    return given.new_empty(size, given.shape[1])


def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    comm: Tensor,
    width: int,
    experts: int,
    grouped: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    refuse_forward_mode()
    context = torch.library.get_ctx()
    unique = context.new_dynamic_size()
    size = context.new_dynamic_size() if grouped else unique
    groups = 2 * experts + 1 if grouped else experts
    (tokens, topk), scales = topk_idx.shape, rest[-1]
    return (
        x.new_empty(size, x.shape[1]),
        _weights(topk_weights, size, grouped, topk, x),
        topk_idx.new_empty(groups),
        topk_idx.new_empty(tokens, width),
        topk_idx.new_empty(unique, topk),
        topk_idx.new_empty(size, 2),
        topk_idx.new_empty(groups),
        _scales(scales, size, x),
    )


def redispatch(
    x: Tensor,
    topk_weights: Tensor | None,
    topk_idx: Tensor,
    routes: Tensor,
    local: Tensor,
    source: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_forward_mode()
    size, topk, grouped, scales = source.shape[0], topk_idx.shape[1], rest[2], rest[-1]
    weights = _weights(topk_weights, size, grouped, topk, x)
    return x.new_empty(size, x.shape[1]), weights, _scales(scales, size, x)


def combine(
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    weight_grads: Tensor | None,
    topk_idx: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    refuse_forward_mode()
    out_weights = (
        y.new_empty(0, dtype=torch.float32)
        if weight_grads is None
        else weight_grads.new_empty(topk_idx.shape)
    )
    return y.new_empty(topk_idx.shape[0], y.shape[1]), out_weights
