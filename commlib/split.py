"""Asynchronous operations for autograd: two nodes each, so that backward overlaps as forward does.

Forward: *start* issues the operation, *finish* waits for it; what is computed in between runs beside it.
Backward visits the nodes in reverse: *finish* issues the adjoint operation, *start* waits for it, and the
gradients of what was computed in between run beside that. For an operation that is never finished (its event
is only waited for), *start* both issues and waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from commlib import ops

if TYPE_CHECKING:
    from commlib.communicator import Attachment

Gradients = tuple[Tensor | None, ...]


class Split:
    """What the two nodes of one operation share.

    Args:
        attachment: what the operation is called on.
        adjoint: issues the adjoint operation on the outputs' gradients; asynchronously, or not.
        complete: from its results, the outputs' gradients and saved inputs to the inputs' gradients.
    """

    def __init__(
        self,
        attachment: Attachment,
        adjoint: Callable[[Sequence[Tensor], bool], Gradients],
        complete: Callable[[Gradients, Sequence[Tensor], Sequence[Tensor]], Gradients],
    ) -> None:
        self._attachment = attachment
        self._adjoint = adjoint
        self._complete = complete
        self._results: Gradients | None = None
        self._event: Any = None

    def begin(self, grads: Sequence[Tensor]) -> None:
        """In finish's backward."""
        if self._results is not None:
            raise RuntimeError(
                "finish() was called twice on one operation, and the results of both were used"
            )
        self._results = self._adjoint(grads, True)
        self._event = self._attachment.take_event()

    def end(self, grads: Sequence[Tensor], saved: Sequence[Tensor]) -> Gradients:
        """In start's backward."""
        results, self._results = self._results, None
        if results is None:
            results = self._adjoint(grads, False)
        else:
            self._event.wait()
        return self._complete(results, grads, saved)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, split: Split, issue: Callable[..., tuple], saved: tuple, *inputs: Tensor | None
    ) -> Any:
        outputs = issue(*inputs)
        ctx.split = split
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, None, *ctx.split.end(grads, ctx.saved_tensors)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split, *tensors: Tensor) -> Any:
        ctx.split = split
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.split.begin(grads)
        return None, *grads  # to start, which takes the adjoint's results instead


def finish(split: Split, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The second node, for tensors whose operation has been waited for."""
    return _Finish.apply(split, *tensors)


def start_dispatch(
    attachment: Attachment,
    issue: Callable[..., tuple],
    x: Tensor,
    weights: Tensor | None,
    routing_of: Callable[[tuple], ops.RoutePlan],
    grouped: bool,
) -> tuple[Split, tuple]:
    """The first node of a dispatch: ``issue(x, weights)`` runs the op, ``routing_of`` finds its routing."""
    routing: list[ops.RoutePlan] = []

    def adjoint(grads: Sequence[Tensor], async_op: bool) -> Gradients:
        g_weights = None if weights is None else grads[1]
        return ops.dispatch_adjoint(routing[0], grouped, grads[0], g_weights, async_op)

    split = Split(attachment, adjoint, lambda results, *_: results)
    outputs = _Start.apply(split, issue, (), x, weights)
    routing.append(routing_of(outputs))
    return split, outputs


def start_combine(
    attachment: Attachment,
    issue: Callable[..., tuple],
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    routing: ops.RoutePlan,
    grouped: bool,
) -> tuple[Split, Tensor]:
    """The first node of a combine: ``issue(y, weights, bias)`` runs the op."""

    def adjoint(grads: Sequence[Tensor], async_op: bool) -> Gradients:
        return ops.combine_adjoint(routing, grouped, grads[0], None, async_op)

    def complete(results: Gradients, grads: Sequence[Tensor], saved: Sequence[Tensor]) -> Gradients:
        rows, _ = results
        assert rows is not None
        gy, gw = ops.gradients_of_rows(rows, *saved)
        return gy, gw, None if bias is None else grads[0]

    split = Split(attachment, adjoint, complete)
    saved = () if weights is None else (y, weights)
    (out,) = _Start.apply(split, issue, saved, y, weights, bias)
    return split, out
