"""Asynchronous operations for autograd: two nodes each, so that backward overlaps as forward does.

Forward: *start* issues the operation, *finish* waits for it; what is computed in between runs beside it.
Backward visits the nodes in reverse: *finish* issues the adjoint operation, *start* waits for it, and the
gradients of what was computed in between run beside that. For an operation that is never finished (its event
is only waited for), *start* both issues and waits. What comes to *start* besides what *finish* hands on is an
error: issuing anew would be one more operation on this rank, and perhaps not on others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from commlib import operations
from commlib.calls import Arrived, Combine, Combined, Dispatch, Rearrived, Redispatch, RoutePlan
from commlib.communicator import Attachment
from commlib.event import Event
from commlib.ops import gradients
from commlib.ops.calling import issue

Gradients = tuple[Tensor | None, ...]
Saved = tuple[Tensor, ...]
_USED_BESIDE = (
    "the results of an asynchronous operation were used beside what finish() returned, or a hook has changed "
    "their gradients: call finish() once, and use or hook what it returned"
)


class _Adjoint(NamedTuple):
    """The adjoint operation that finish has issued, in which pass through the graph, and on what."""

    graph_task: int
    grads: tuple[Tensor, ...]
    versions: tuple[int, ...]
    results: Gradients
    event: Event | None

    def is_of(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are the same gradients, with nothing added to them or changed in them.

        They lie at the same place, though autograd may hand on another tensor of it; while they are kept
        here, it adds to none in place.
        """
        pairs = zip(self.grads, grads, strict=False)  # results that are no numbers follow
        same = all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
        return same and self.versions == tuple(map(_version, self.grads))


def _version(grad: Tensor) -> int:
    return 0 if grad.is_inference() else grad._version  # which counts changes in place


class _Recorded(ABC):
    """What the two nodes of one operation share.

    Attributes:
        event: of the operation just issued, until it is taken.
        results: names of what finish takes.
    """

    event: Event | None = None
    results: tuple[str, ...]

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        # Left behind where a pass ends before start: by an error, or since nobody asks for what comes before.
        self._adjoint: _Adjoint | None = None

    @abstractmethod
    def issue(self) -> tuple[Tensor | None, ...]:
        """In start's forward: the operation's results."""

    @abstractmethod
    def issue_adjoint(
        self, grads: Sequence[Tensor], saved: Saved, async_op: bool
    ) -> tuple[Gradients, Event | None]:
        """Gradients of the inputs, from those of the results and saved inputs: the adjoint operation's."""

    def finish(self, saved: Saved, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The second node, for tensors whose operation has been waited for.

        Raises:
            ValueError: they are not the operation's results.
        """
        mine = [
            t.output_nr if getattr(getattr(t, "grad_fn", None), "started", None) is self else None
            for t in tensors
        ]
        if mine != list(range(len(self.results))):
            raise ValueError(
                f"finish takes the results of its operation, {' and '.join(self.results)}, in this order and "
                "as they came"
            )
        return _Finish.apply(self, saved, *tensors)

    def begin_backward(self, grads: Sequence[Tensor], saved: Saved) -> None:
        """In finish's backward."""
        task = torch._C._current_graph_task_id()
        if self._adjoint is not None and self._adjoint.graph_task == task:
            raise RuntimeError(_USED_BESIDE)
        versions = tuple(map(_version, grads))
        self._adjoint = _Adjoint(task, tuple(grads), versions, *self.issue_adjoint(grads, saved, True))

    def end_backward(self, grads: Sequence[Tensor], saved: Callable[[], Saved]) -> Gradients:
        """In start's backward. It reads what was saved only if finish's backward has not."""
        adjoint, self._adjoint = self._adjoint, None
        if adjoint is None or adjoint.graph_task != torch._C._current_graph_task_id():
            return self.issue_adjoint(grads, saved(), False)[0]
        if not adjoint.is_of(grads):
            raise RuntimeError(_USED_BESIDE)
        if adjoint.event is not None:
            adjoint.event.wait()
        return adjoint.results


class _RecordedDispatch(_Recorded):
    def __init__(self, attachment: Attachment, call: Dispatch | Redispatch, in_waves: bool = False) -> None:
        super().__init__(attachment)
        self._in_waves = in_waves
        self._call: Dispatch | Redispatch | None = call  # until it is issued: it holds rows
        self._grouped, self._has_weights = call.grouped, call.topk_weights is not None
        self.results = ("d.x", "d.topk_weights") if self._has_weights else ("d.x",)
        self.plan: RoutePlan | None = None  # once it has been issued

    def issue(self) -> tuple[Tensor | None, ...]:
        call, self._call = self._call, None
        if isinstance(call, Dispatch):
            arrived, self.event = issue(operations.dispatch, self._attachment, call, True, self._in_waves)
            self.plan = arrived.plan(call)
            return arrived[:-1]
        assert call is not None
        results, self.event = issue(operations.redispatch, self._attachment, call, True)
        self.plan = call.plan
        return tuple(results)

    def issue_adjoint(
        self, grads: Sequence[Tensor], saved: Saved, async_op: bool
    ) -> tuple[Combined, Event | None]:
        assert self.plan is not None
        g_weights = grads[1] if self._has_weights else None
        rest = self._attachment, async_op
        return gradients.of_dispatch(self.plan, self._grouped, grads[0], g_weights, *rest)


class _RecordedCombine(_Recorded):
    results = ("out",)

    def __init__(self, attachment: Attachment, call: Combine) -> None:
        super().__init__(attachment)
        self._call: Combine | None = call
        self._plan, self._grouped, self._has_bias = call.plan, call.grouped, call.bias is not None

    def issue(self) -> tuple[Tensor | None, ...]:
        call, self._call = self._call, None
        assert call is not None
        results, self.event = issue(operations.combine, self._attachment, call, True)
        return tuple(results)

    def issue_adjoint(
        self, grads: Sequence[Tensor], saved: Saved, async_op: bool
    ) -> tuple[Gradients, Event | None]:
        y, weights = saved or (None, None)
        rest = self._attachment, async_op
        (gy, _, _, gw), event = gradients.of_combine(
            self._plan, self._grouped, grads[0], None, y, weights, *rest
        )
        return (gy, gw, grads[0] if self._has_bias else None), event


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, saved: Saved, *inputs: Tensor | None) -> Any:
        outputs = recorded.issue()
        ctx.started = recorded
        ctx.save_for_backward(*saved)
        known = (t for t in outputs if t is not None)
        ctx.mark_non_differentiable(*(t for t in known if not t.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *ctx.started.end_backward(grads, lambda: ctx.saved_tensors)


class _Unfinished(NamedTuple):
    """What an event knows of its operation.

    The inputs that both nodes save: the operation itself would keep them for as long as the graph lives.
    """

    recorded: _Recorded
    saved: Saved

    def finish(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.recorded.finish(self.saved, tensors)


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, saved: Saved, *tensors: Tensor) -> Any:
        ctx.finished = recorded
        ctx.save_for_backward(*saved)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.finished.begin_backward(grads, ctx.saved_tensors)
        return None, None, *grads  # to start, which takes the adjoint's results instead


def _started(recorded: _Recorded, saved: Saved, *inputs: Tensor | None) -> tuple[tuple, Event]:
    outputs = _Start.apply(recorded, saved, *inputs)
    event, recorded.event = recorded.event, None
    assert event is not None
    event.recorded = _Unfinished(recorded, saved)
    return outputs, event


def dispatch(a: Attachment, call: Dispatch, in_waves: bool) -> tuple[Arrived, Event]:
    """The first node of an asynchronous dispatch."""
    recorded = _RecordedDispatch(a, call, in_waves)
    outputs, event = _started(recorded, (), call.x, call.topk_weights)
    assert recorded.plan is not None
    return Arrived(*outputs)._replace(view=recorded.plan.view), event


def redispatch(a: Attachment, call: Redispatch) -> tuple[Rearrived, Event]:
    """The first node of an asynchronous dispatch along a known routing."""
    outputs, event = _started(_RecordedDispatch(a, call), (), call.x, call.topk_weights)
    return Rearrived(*outputs), event


def combine(a: Attachment, call: Combine) -> tuple[Combined, Event]:
    """The first node of an asynchronous combine."""
    saved = () if call.weights is None else (call.y, call.weights)
    outputs, event = _started(_RecordedCombine(a, call), saved, call.y, call.weights, call.bias)
    return Combined(*outputs), event
