"""Call an op where something in PyTorch has to see it, and what it does otherwise: that is much faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

from commlib import checks, operations
from commlib.calls import Arrived, Combine, Combined, Dispatch, Rearrived, Redispatch
from commlib.communicator import Attachment, attachment_of
from commlib.event import Event
from commlib.ops import schema
from commlib.ops.schema import flat

_Came = TypeVar("_Came", Arrived, Rearrived)
_Result = TypeVar("_Result")
_peek = torch._C._functorch.peek_interpreter_stack


def dispatch(
    call: Dispatch, a: Attachment | None = None, async_op: bool = False, in_waves: bool = False
) -> tuple[Arrived, Event | None]:
    """:func:`commlib.operations.dispatch` of the attachment that the call names, ``a`` where it is known."""
    if not async_op and is_seen(call.x, call.topk_weights, call.scales):
        _refuse_transformed(call.x, call.topk_weights)
        op: Any = schema.traced_dispatch if torch.compiler.is_compiling() else schema.dispatch
        return _with_none(Arrived(*op(*call)), call), None
    return issue(operations.dispatch, a or attachment_of(call.comm), call, async_op, in_waves)


def redispatch(
    call: Redispatch, a: Attachment | None = None, async_op: bool = False
) -> tuple[Rearrived, Event | None]:
    """:func:`commlib.operations.redispatch`, likewise."""
    if not async_op and is_seen(call.x, call.topk_weights, call.scales, call.y, call.y_weights):
        _refuse_transformed(call.x, call.topk_weights, call.y, call.y_weights)
        came = _with_none(Rearrived(*schema.redispatch(*flat(call))), call)
        return (came._replace(y_dots=None) if call.y is None else came), None
    return issue(operations.redispatch, a or attachment_of(call.plan.comm), call, async_op)


def combine(
    call: Combine, a: Attachment | None = None, async_op: bool = False
) -> tuple[Combined, Event | None]:
    """:func:`commlib.operations.combine`, likewise."""
    if not async_op and is_seen(call.y, call.weights, call.bias, call.weight_grads):
        _refuse_transformed(call.y, call.weights, call.bias)
        return Combined(*schema.combine(*flat(call))), None
    return issue(operations.combine, a or attachment_of(call.plan.comm), call, async_op)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:  # noqa: SIM110
        if t is not None and t.requires_grad:
            return True
    return False


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors has to be an op, and so cannot be asynchronous.

    That is for a tracer, a mode of dispatch, a transformation as torch.func's, or a tensor of another class.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _peek() is not None:
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    for t in tensors:  # noqa: SIM110 (any() would take as long as all the rest)
        if t is not None and type(t) not in checks.ORDINARY:
            return True
    return False


def is_seen(*tensors: Tensor | None) -> bool:
    """Whether anything in PyTorch has to see an operation on these tensors.

    Besides what traces it, that is autograd, a profiler, or a mode of functions, as a default device is.
    """
    if profiler._is_profiler_enabled or torch._C._len_torch_function_stack():
        return True
    return wants_gradient(*tensors) or is_traced(*tensors)


def _refuse_transformed(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError where torch.func is to differentiate: the ops' gradients are autograd's."""
    if not torch.compiler.is_compiling() and _peek() is not None and wants_gradient(*tensors):
        raise NotImplementedError(
            "dispatch and combine have no gradient under torch.func (grad, vjp, jacrev): use backward or "
            "torch.autograd.grad"
        )


def issue(operation: Callable[..., _Result], a: Attachment, call: Any, *options: bool) -> _Result:
    """An operation that is no op, because nothing has to see it, or because it is asynchronous."""
    if not profiler._is_profiler_enabled:
        return operation(a, call, *options)
    with profiler.record_function(f"commlib::{operation.__name__}"):
        return operation(a, call, *options)


def _with_none(came: _Came, call: Dispatch | Redispatch) -> _Came:
    """None for an op's empty tensors, in place of what has not been sent."""
    weights = None if call.topk_weights is None else came.weights
    has_scales = call.scales is not None or call.quantize
    return came._replace(weights=weights, scales=came.scales if has_scales else None)
