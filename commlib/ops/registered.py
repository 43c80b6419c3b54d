"""What PyTorch is told that each op does: on tensors, on their shapes, to gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from commlib import checks, operations
from commlib.calls import Arrived, Combine, Dispatch, Redispatch, RoutePlan
from commlib.communicator import attachment_of
from commlib.ops import compiling, fakes, gradients, schema
from commlib.ops.schema import PLANNED, unflat

# On tensors. An op gives tensors only: an empty one in place of a result that there is not.


def _dispatch(*arguments: Any) -> tuple[Tensor, ...]:
    call = Dispatch(*arguments)
    a = attachment_of(call.comm)
    checks.check_sizes(a.communicator, call)
    *results, _view = operations.dispatch(a, call)[0]
    return _tensors(results, call.x)


def _redispatch(*arguments: Any) -> tuple[Tensor, ...]:
    call = unflat(Redispatch, arguments)
    return _tensors(operations.redispatch(attachment_of(call.plan.comm), call)[0], call.x)


def _combine(*arguments: Any) -> tuple[Tensor, ...]:
    call = unflat(Combine, arguments)
    return _tensors(operations.combine(attachment_of(call.plan.comm), call)[0], call.y)


def _tensors(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(fakes.nothing(like) if t is None else t for t in results)


# Gradients.


def _setup_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call = Dispatch(*inputs)
    _save_plan(ctx, call, Arrived(*output).plan(call))


def _setup_redispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call = unflat(Redispatch, inputs)
    weighed = () if call.y is None or call.y_weights is None else (call.x, call.y, call.y_weights)
    _save_plan(ctx, call, call.plan, weighed)


def _save_plan(
    ctx: Any, call: Dispatch | Redispatch, plan: RoutePlan, weighed: tuple[Tensor, ...] = ()
) -> None:
    ctx.kind, ctx.grouped, ctx.has_weights = type(call), call.grouped, call.topk_weights is not None
    ctx.save_for_backward(*plan[:PLANNED], *weighed)
    compiling.save_results()


def _dispatch_backward(ctx: Any, g_rows: Tensor, g_weights: Tensor, *rest: Tensor) -> tuple[Any, ...]:
    """Of both: the gradient of a dispatch does not depend on how its routing was found."""
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second read
    plan, weighed = RoutePlan(*saved[:PLANNED]), saved[PLANNED:]
    given = g_weights if ctx.has_weights else None
    of_weighed: dict[str, Tensor | None] = {}
    if weighed:
        g_rows, of_weighed = gradients.of_weighing(plan, ctx.grouped, weighed, g_rows, rest[-1])
    (gx, gw), _event = gradients.of_dispatch(plan, ctx.grouped, g_rows, given)
    return schema.gradients(ctx.kind, x=gx, topk_weights=gw if ctx.has_weights else None, **of_weighed)


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call = unflat(Combine, inputs)
    ctx.grouped, ctx.has_bias, ctx.brings_back = (
        call.grouped,
        call.bias is not None,
        call.weight_grads is not None,
    )
    weighted = () if call.weights is None else (call.y, call.weights)
    ctx.save_for_backward(*call.plan[:PLANNED], *weighted)
    compiling.save_results()


def _combine_backward(ctx: Any, g_out: Tensor, g_back: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    given = g_back if ctx.brings_back else None
    y, weights = saved[PLANNED:] or (None, None)
    plan = RoutePlan(*saved[:PLANNED])
    (gy, g_values, _, gw), _event = gradients.of_combine(plan, ctx.grouped, g_out, given, y, weights)
    return schema.gradients(
        Combine,
        y=gy,
        weights=gw,
        bias=g_out if ctx.has_bias else None,
        weight_grads=g_values if ctx.brings_back else None,
    )


def _register(op: Any, kernel: Any, fake: Any, backward: Any, setup_context: Any) -> None:
    name = op._schema.name
    for device in ("CPU", "CUDA"):
        schema.library.impl(name.removeprefix("commlib::"), kernel, device)
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_vmap(name, compiling.refuse_vmap)


_register(schema.dispatch, _dispatch, fakes.dispatch, _dispatch_backward, _setup_dispatch)
_register(
    schema.traced_dispatch,
    lambda *arguments: list(_dispatch(*arguments)),
    lambda *arguments: list(fakes.dispatch(*arguments)),
    lambda ctx, grads: _dispatch_backward(ctx, *grads),
    _setup_dispatch,
)
_register(schema.redispatch, _redispatch, fakes.redispatch, _dispatch_backward, _setup_redispatch)
_register(schema.combine, _combine, fakes.combine, _combine_backward, _setup_combine)
for _op in (schema.traced_dispatch, schema.redispatch, schema.combine):
    compiling.keep_in_order(_op)
