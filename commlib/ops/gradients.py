"""The gradients of dispatch and combine, which are each other's adjoints: written with the operations."""

from __future__ import annotations

from collections.abc import Sequence

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
    y: Tensor | None,
    weights: Tensor | None,
    a: Attachment | None = None,
    async_op: bool = False,
) -> tuple[Rearrived, Event | None]:
    """Gradients of y (the rows), its weights (the dots) and values brought back: a dispatch along the routes.

    ``y``, ``weights``: None, both, where there were no weights.
    """
    values = None if g_back is None else _dense(g_back)
    call = Redispatch(_dense(g_out), values, plan, grouped, False, None, y, weights)
    return calling.redispatch(call, a, async_op)


def of_weighing(
    plan: RoutePlan, grouped: bool, weighed: Sequence[Tensor], g_rows: Tensor, g_dots: Tensor
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Gradients of what a combine's gradient weighs: of the rows that come, and of y and y_weights by name.

    ``weighed``: its x, y and y_weights. It is linear in each, so for the last two it serves once more, on
    the gradients of its results in their place.
    """
    x, y, weights = weighed
    wide = g_rows.to(weights.dtype) * weights.unsqueeze(-1) + y.to(weights.dtype) * g_dots.unsqueeze(-1)
    again, _event = of_combine(plan, grouped, x, None, _dense(g_rows), _dense(g_dots))
    return wide.to(x.dtype), {"y": again.rows, "y_weights": again.y_dots}


def _dense(gradient: Tensor) -> Tensor:
    """Whatever another backward has given."""
    return gradient.resolve_conj().resolve_neg().contiguous()
