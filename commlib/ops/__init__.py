"""``torch.ops.commlib.*``: dispatch, redispatch (with a known routing) and combine, as PyTorch sees them.

The ops take and return plain tensors, so autograd, ``torch.compile`` and activation checkpointing see
ordinary functions. A tensor names the communicator, since ops cannot take Python objects. Asynchronous
operations are no ops: autograd knows them as two nodes (:mod:`commlib.ops.recorded`). Where a tracer has to
see one, it is an op, and done when its call returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commlib import checks, operations
from commlib.calls import Arrived, Combine, Combined, Dispatch, Rearrived, Redispatch
from commlib.communicator import Attachment
from commlib.event import Event
from commlib.ops import calling, recorded, registered
from commlib.ops.calling import is_traced, wants_gradient

__all__ = ["combine", "combine_into", "dispatch", "redispatch", "registered", "wants_gradient"]


def dispatch(
    a: Attachment, call: Dispatch, async_op: bool = False, in_waves: bool = False
) -> tuple[Arrived, Event | None]:
    """:func:`commlib.operations.dispatch` for a caller who may want gradients."""
    if async_op and is_traced(call.x, call.topk_weights, call.scales):
        return calling.dispatch(call, a)[0], a.communicator.backend.done()
    if async_op and wants_gradient(call.x, call.topk_weights):
        return recorded.dispatch(a, call, in_waves)
    return calling.dispatch(call, a, async_op, in_waves)


def redispatch(a: Attachment, call: Redispatch, async_op: bool = False) -> tuple[Rearrived, Event | None]:
    """:func:`commlib.operations.redispatch`, likewise."""
    if async_op and is_traced(call.x, call.topk_weights, call.scales):
        return calling.redispatch(call, a)[0], a.communicator.backend.done()
    if async_op and wants_gradient(call.x, call.topk_weights):
        return recorded.redispatch(a, call)
    return calling.redispatch(call, a, async_op)


def combine(a: Attachment, call: Combine, async_op: bool = False) -> tuple[Combined, Event | None]:
    """:func:`commlib.operations.combine`, likewise."""
    if async_op and is_traced(call.y, call.weights, call.bias):
        return calling.combine(call, a)[0], a.communicator.backend.done()
    if async_op and wants_gradient(call.y, call.weights, call.bias):
        return recorded.combine(a, call)
    return calling.combine(call, a, async_op)


def combine_into(out: Tensor, a: Attachment, call: Combine, async_op: bool = False) -> Event | None:
    """combine, written into ``out``; not differentiable. Autograd learns that ``out`` has changed."""
    if torch.compiler.is_compiling():
        out.copy_(combine(a, call)[0].out)
        return None
    checks.check_apart(out, {"y": call.y, "weights": call.weights, "bias": call.bias})
    event = operations.combine(a, call, async_op, out)[1]
    torch.autograd.graph.increment_version(out)
    return event
