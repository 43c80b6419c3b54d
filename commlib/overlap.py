"""Compute beside communication: a layer in chunks, and micro-batches in turns.

Both only order calls of :class:`commlib.ExpertParallel` with ``async_op=True``. The order is the same on
every rank, whatever its tokens, and backward runs through it in reverse (:meth:`commlib.Event.finish`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from commlib.dispatched import Dispatched
    from commlib.expert_parallel import ExpertParallel

T = TypeVar("T")
Steps = Generator[None, None, T]  # gives way at each yield; returns a T


def run_experts(
    ep: ExpertParallel,
    experts: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    chunks: int = 1,
    align: int = 1,
    beside: Callable[[], T] | None = None,
    bounded: bool = False,
) -> tuple[Tensor, T | None]:
    """Dispatch, experts and combine, in chunks that overlap.

    While the experts work on chunk i, the dispatches of later chunks and the combines of earlier ones are
    under way, in forward and in backward. All dispatches are issued first: a GPU's host then waits for no
    counts between experts, and in backward, which runs in reverse, the wait for their gradients comes last.
    All ranks use the same number of chunks; those beyond ``ep``'s number of slots wait for a free one.

    Args:
        ep: the communicator.
        experts: ``(rows [M, H], offsets [local experts + 1]) -> [M, H]``.
        x, topk_idx, topk_weights: ``[T, H]``, ``[T, K]``, ``[T, K]``, as for dispatch.
        chunks: at least 1; more than T leaves some of them empty.
        align: as for dispatch.
        beside: called while the first dispatch is under way: a shared expert, for example.
        bounded: rows come in results of one size, as for dispatch.

    Returns:
        ``[T, H]``, and what ``beside`` returned.
    """

    def weighted_later(d: Dispatched) -> tuple[Tensor, Tensor]:
        return experts(d.x, d.offsets), d.topk_weights

    parts = (x, topk_idx, topk_weights)
    how: dict[str, Any] = {"chunks": chunks, "align": align, "bounded": bounded}
    return run_dispatched(ep, weighted_later, *parts, beside=beside, **how)


def run_dispatched(
    ep: ExpertParallel,
    experts: Callable[[Dispatched], tuple[Tensor, Tensor | None]],
    *rows: Tensor,
    chunks: int,
    align: int,
    beside: Callable[[], T] | None,
    bounded: bool = False,
) -> tuple[Tensor, T | None]:
    """:func:`run_experts`, for experts that take what a dispatch returns, and return what combine takes.

    Args:
        ep, chunks, align, beside, bounded: as there.
        experts: returns the rows, and the weights that combine is to apply; None: they have been.
        rows: x, topk_idx and topk_weights.
    """
    parts = [t.tensor_split(chunks) for t in rows]

    def send(*part: Tensor) -> Dispatched:
        return ep.dispatch(*part, layout="expert", align=align, bounded=bounded, async_op=True)

    arriving = [send(*part) for part in zip(*parts, strict=True)]
    extra = None if beside is None else beside()
    returning = []
    while arriving:
        d = arriving.pop(0).finish()
        y, weights = experts(d)
        returning.append(ep.combine(y, d.handle, weights=weights, async_op=True))
    return torch.cat([event.finish(out)[0] for out, event in returning]), extra


def take_turns(batches: Iterable[Steps[T]]) -> list[T]:
    """Run generators in turns, each from one ``yield`` to its next.

    Returns:
        What each of them returned, in order.
    """
    waiting = dict(enumerate(batches))
    results: dict[int, T] = {}
    while waiting:
        for i, batch in list(waiting.items()):
            try:
                next(batch)
            except StopIteration as stop:
                results[i] = stop.value
                del waiting[i]
    return [results[i] for i in sorted(results)]


class TwoBatch(Generic[T]):
    """Two micro-batches through the same steps: one computes while the other communicates.

    Args:
        steps: a generator function. It yields between the start and the finish of each asynchronous
            operation, as :meth:`commlib.nn.MoELayer.steps` does::

                def block(x):
                    x = x + attention(x)
                    y, aux = yield from moe.steps(x)
                    return x + y

                out_a, out_b = TwoBatch(block)(a, b)
    """

    def __init__(self, steps: Callable[..., Steps[T]]) -> None:
        self.steps = steps

    def __call__(self, first: Any, second: Any) -> tuple[T, T]:
        a, b = take_turns([self.steps(first), self.steps(second)])
        return a, b
