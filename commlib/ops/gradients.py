"""The gradients of dispatch and combine, which are each other's adjoints: written with the operations."""

from __future__ import annotations

from torch import Tensor

from commlib.calls import Combine, Combined, Rearrived, Redispatch, RoutePlan
from commlib.communicator import Attachment
from commlib.event import Event
from commlib.ops import calling


def of_dispatch(
    plan: RoutePlan,
    grouped: bool,
    g_rows: Tensor,
    g_weights: Tensor | None,
    a: Attachment | None = None,
    async_op: bool = False,
) -> tuple[Combined, Event | None]:
    """Gradients of x and topk_weights: a combine along the same routes."""
    values = None if g_weights is None else _dense(g_weights)
    return calling.combine(Combine(_dense(g_rows), None, None, values, plan, grouped), a, async_op)


def of_combine(
    plan: RoutePlan,
    grouped: bool,
    g_out: Tensor,
    g_back: Tensor | None,
    a: Attachment | None = None,
    async_op: bool = False,
) -> tuple[Rearrived, Event | None]:
    """Rows of the output's gradient, and gradients of values brought back: a dispatch along the routes."""
    weights = None if g_back is None else _dense(g_back)
    call = Redispatch(_dense(g_out), weights, plan, grouped, zero_copy=False, scales=None)
    return calling.redispatch(call, a, async_op)


def _dense(gradient: Tensor) -> Tensor:
    """Whatever another backward has given."""
    return gradient.resolve_conj().resolve_neg().contiguous()


def of_rows(
    rows: Tensor, y: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of y and of its weights, from rows of the output's gradient."""
    if y is None or weights is None:
        return rows, None
    wide = rows.to(weights.dtype)
    return (wide * weights.unsqueeze(-1)).to(rows.dtype), (wide * y.to(weights.dtype)).sum(-1)
