"""What a dispatch returns: rows, and the handle of their routing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol

import torch
from torch import Tensor

from commlib import checks, ops
from commlib.arguments import as_int
from commlib.arrays import Array
from commlib.calls import Arrived, Combine, Rearrived, RoutePlan
from commlib.checks import Layout
from commlib.communicator import Attachment, Communicator
from commlib.devices import platform_of
from commlib.errors import HandleError
from commlib.event import Event
from commlib.settings import Settings


class Owner(Protocol):
    """What a handle asks of the :class:`commlib.ExpertParallel` that it is of."""

    rank: int
    size: int
    device: torch.device
    num_local_experts: int
    _attachment: Attachment
    _comm: Communicator
    _name: Tensor

    @property
    def settings(self) -> Settings: ...


class Handle:
    """The routing of one dispatch: for ``combine``, for backward, for a later ``dispatch``.

    Holds small tensors only (no rows). Zero-copy results keep their receive slot by themselves, until the
    last tensor that views it is gone.
    """

    def __init__(
        self, ep: Owner, plan: RoutePlan, layout: Layout, align: int, counts: Tensor | None = None
    ) -> None:
        self._ep = ep
        self._known: RoutePlan | None = plan
        self.layout = layout
        self.align = align
        self.bounded = counts is not None
        self._counts = counts  # bounded: a copy of the plan's groups, which a user may change

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank sent, which are the rows of ``combine``'s result."""
        return self._plan.routes.shape[0]

    @property
    def num_rows(self) -> int:
        """Rows of ``Dispatched.x``, and of what ``combine`` takes."""
        return self._plan.source.shape[0]

    def counts(self) -> list[int]:
        """Tokens of each local expert, before padding, on the host.

        They are known as soon as dispatch has returned. ``Dispatched.tokens_per_expert`` of an asynchronous
        dispatch on a GPU is not: it comes with the rows.

        Raises:
            ValueError: the dispatch was bounded, and its counts stay on the device.
        """
        if self.bounded:
            raise ValueError("a bounded dispatch tells the host no counts: see Dispatched.tokens_per_expert")
        return self._plan.groups[: self._ep.num_local_experts].tolist()

    def on(self, ep: Owner) -> Handle:
        """The same routing for rows of another dtype or width, on another communicator.

        All ranks call it: the other communicator takes a larger heap here where it grows and this one's is
        larger.

        Args:
            ep: of the same ranks, ``num_experts`` and ``topk``, on the same device.

        Raises:
            HandleError: this handle has been released.
            ValueError: ``ep`` has other ranks, experts or top-k places, or was made for fewer rows or tokens.
        """
        mine, theirs = self._ep, ep
        for name in ("rank", "size", "device"):
            _check_same(name, getattr(mine, name), getattr(theirs, name))
        for name in ("num_experts", "topk"):
            _check_same(name, getattr(mine.settings, name), getattr(theirs.settings, name))
        settings, plan = mine.settings, self._plan
        theirs._comm.make_room(settings.capacity_on(mine.size), settings.max_tokens)
        room, other = settings.grouped_rows, theirs.settings.grouped_rows
        if self._grouped and other not in (0, room):  # places are of rows for which there is as much room
            raise ValueError(
                f"the handle's grouped rows lie in slots with room for {room}, those of the other "
                f"communicator have room for {other}: give both the same grouping and max_grouped_rows"
            )
        return Handle(
            theirs, plan._replace(comm=theirs._name, view=None), self.layout, self.align, self._counts
        )

    def release(self) -> None:
        """Give the handle up: using it again raises HandleError. Twice is fine."""
        self._known = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return copy.copy(self)  # on the same communicator; nobody changes a routing's tensors

    @property
    def _plan(self) -> RoutePlan:
        if self._known is None:
            raise HandleError("this handle has been released")
        return self._known

    @property
    def _grouped(self) -> bool:
        return self.layout != "rank"


def _check_same(name: str, mine: Any, theirs: Any) -> None:
    if mine != theirs:
        raise ValueError(f"the handle is of a communicator with {name} {mine}, the other one has {theirs}")


def flat(handle: Handle, tensor: Tensor | None, width: int = 2) -> Any:
    """Rows as the ops take them, one after another; ``width``: how many dimensions that makes.

    Raises:
        ValueError: the layout is "batched", and they are not ``[local experts, rows of each, ...]``.
    """
    if tensor is None or handle.layout != "batched" or tensor.dim() == width:
        return tensor
    experts = handle._ep.num_local_experts
    if tensor.dim() != width + 1 or tensor.shape[:2].numel() != handle.num_rows or tensor.shape[0] != experts:
        raise ValueError(
            f'rows of layout "batched" must be [{experts}, {handle.num_rows // max(experts, 1)}, ...], got '
            f"{list(tensor.shape)}"
        )
    return tensor.flatten(0, 1)


def unflat(handle: Handle, tensor: Tensor) -> Tensor:
    """The same in the layout of the handle."""
    if handle.layout != "batched":
        return tensor
    experts = handle._ep.num_local_experts
    each = tensor.shape[0] // experts if experts else handle._ep._comm.bounds("batched", 1).fixed
    return tensor.unflatten(0, (experts, each))


def check_handle(ep: Owner, handle: Handle, layout: str | None = None, topk_idx: Any = None) -> None:
    """That the handle is this communicator's, and that what is given beside it says the same."""
    if not isinstance(handle, Handle):
        raise TypeError(f"handle must be a Dispatched.handle, got {type(handle).__name__}")
    if handle._ep is not ep:
        raise HandleError(
            "this handle is of a dispatch on another communicator (handle.on(ep) makes it one of this)"
        )
    plan = handle._plan
    if layout is not None and layout != handle.layout:
        raise ValueError(f'the handle\'s layout is "{handle.layout}", not "{layout}"')
    if topk_idx is not None and not torch.compiler.is_compiling():
        given = checks.tensor_on(ep.device, "topk_idx", topk_idx)
        differs = given.shape != plan.topk_idx.shape
        if not differs and platform_of(ep.device).readable(given):
            differs = not bool((given == plan.topk_idx).all())
        if differs:
            raise ValueError("topk_idx differs from that of the handle; leave it out (None)")


@dataclass(eq=False)
class Dispatched(Generic[Array]):
    """Rows that a rank received. N: unique rows; M: rows grouped by expert, padding included.

    Of a bounded dispatch, N and M are the room there is, and what is behind the last row is undefined in
    ``x`` and ``scales``, -1 in ``topk_idx`` and ``source``, 0 in ``topk_weights``. Layout "batched": as
    "expert", with ``[local experts, rows_per_expert]`` in place of ``[M]``, and padding that is undefined.

    Its arrays are of the kind of dispatch's ``x``: a ``Dispatched[Tensor]`` for a Tensor.

    Attributes:
        x: layout "rank": ``[N, hidden]``, ordered by source rank, then token. "expert": ``[M, hidden]``,
            grouped by local expert, in each group by source rank, then token; padding rows are zero.
        topk_idx: "rank": ``[N, topk]`` int64 local expert ids, -1 where another rank owns the expert.
        topk_weights: "rank": ``[N, topk]``, 0 where -1; "expert": ``[M]``, 0 in padding; None if dispatch
            got none. float32 (float64 for float64 rows).
        tokens_per_expert: ``[local experts]`` int64, before padding.
        offsets: "expert": ``[local experts + 1]`` int64, where each group begins, after padding.
        source: ``[N, 2]`` or ``[M, 2]`` int64: rank and token of each row; -1 in padding.
        scales: what came with rows that were given with scales, ``[N, S]`` or ``[M, S]``, zero in padding;
            else None.
        handle: the routing.
        event: with ``async_op``: when the rows are there.
        num_rows: bounded, but for "batched": how many rows there are, on the device (0-d int64).
        dropped: bounded: how many rows this rank had no room for, likewise; with groups, rows of experts.
    """

    # "| Any": or None; callers of dispatch know which, and a type checker need not ask them each time.
    x: Array
    topk_idx: Array | Any
    topk_weights: Array | Any
    tokens_per_expert: Array
    offsets: Array | Any
    source: Array
    handle: Handle
    event: Event | None = None
    scales: Array | Any = None
    num_rows: Array | Any = None
    dropped: Array | Any = None

    @staticmethod
    def _of(
        handle: Handle,
        export: Callable[[Tensor], Any],
        came: Arrived | Rearrived,
        groups: Tensor,
        event: Event | None,
    ) -> Dispatched[Any]:
        """What a dispatch returns, of arrays that ``export`` makes; ``groups``: as in RoutePlan, a copy."""
        plan, experts = handle._plan, handle._ep.num_local_experts
        sizes = (experts, (experts + 1) * handle._grouped, 2 * handle.bounded)
        groups, offsets, totals = groups.split_with_sizes(sizes)
        given = handle.layout == "expert"
        num_rows, dropped = totals if handle.bounded else (None, None)
        if handle.bounded and handle._grouped:
            num_rows = offsets[-1] if given else None

        def out(tensor: Tensor | None, rows: bool = False) -> Any:
            return None if tensor is None else export(unflat(handle, tensor) if rows else tensor)

        return Dispatched(
            x=out(came.rows, rows=True),
            topk_idx=None if handle._grouped else export(plan.local),
            topk_weights=out(came.weights, rows=True),
            tokens_per_expert=export(groups),
            offsets=export(offsets) if given else None,
            # Another tensor: the plan's length is nobody's to change.
            source=out(plan.source.detach(), rows=True),
            handle=handle,
            event=event,
            scales=out(came.scales, rows=True),
            num_rows=out(num_rows),
            dropped=out(dropped),
        )

    def finish(self) -> Dispatched[Array]:
        """Wait for the rows of a dispatch with ``async_op``; see :meth:`commlib.Event.finish`."""
        if self.event is None:
            return self
        if self.event.recorded is None:
            self.event.wait()
            return replace(self, event=None)
        x: Any = self.x  # a tensor: autograd records nothing else
        weights: Any = self.topk_weights
        if self.handle.layout == "batched":  # views of what the operation gave
            x, weights = x._base, None if weights is None else weights._base
        if weights is None:
            (x,) = self.event.finish(x)
        else:
            x, weights = self.event.finish(x, weights)
            weights = unflat(self.handle, weights)
        x = unflat(self.handle, x)
        return replace(self, x=x, topk_weights=weights, event=None)

    def wait_expert(self, expert: int) -> None:
        """Make what the caller does next come after the arrival of one expert's rows.

        CPU: blocks the calling thread. CUDA: the current stream waits, without occupying an SM; the host does
        not. Returns at once where the rows are there; after a dispatch without ``in_waves`` it waits for all
        rows. ``topk_weights`` and ``source`` of all rows come with the first rows. What is computed from
        ``x`` here belongs to one autograd node: :meth:`finish` only waits from here on.

        Args:
            expert: local number, ``0 <= expert < local experts``: rows ``x[offsets[e]:offsets[e + 1]]``.

        Raises:
            TypeError: expert is not an int.
            ValueError: the layout is not "expert", or there is no such local expert.
            PeerTimeout: a rank did not do its part in time (CPU; on CUDA the stream goes on, and the next
                call raises).
        """
        if self.handle.layout != "expert":
            raise ValueError(f'wait_expert needs layout "expert", not "{self.handle.layout}"')
        experts = self.handle._ep.num_local_experts
        expert = as_int("expert", expert)
        if not 0 <= expert < experts:
            raise ValueError(f"expert is {expert}, but this rank has local experts 0 to {experts - 1}")
        if self.event is not None:
            self.event.wait_expert(expert)


def spare_buffer(handle: Handle, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Memory like :meth:`commlib.ExpertParallel.combine_buffer`, but a tensor like any other: hooks may keep
    it. None: that has another shape or dtype, or all slots are needed.
    """
    c = handle._ep._comm
    if list(shape) != [handle.num_rows, c.settings.hidden] or dtype != c.settings.dtype:
        return None
    if not c.can_group_in_slot(handle.num_rows) or not c.can_spare_slots(1):
        return None
    return c.lend_rows(handle.num_rows, once=False)


def combine_places(
    handle: Handle, y: Tensor, values: Tensor, bias: Tensor | None = None, async_op: bool = False
) -> tuple[Tensor, Tensor, Event | None]:
    """Sum rows as :meth:`commlib.ExpertParallel.combine`, and bring a value of each place back to its token.

    The adjoint of a dispatch with weights, in one operation: gradients of its ``x`` and ``topk_weights``
    from those of its results. Not differentiable.

    Args:
        handle: of the dispatch; its communicator does it.
        y: ``[num_rows, hidden]`` in the layout of the handle, of the communicator's dtype.
        values: layout "rank": ``[N, topk]``; only places whose expert this rank owns are read; "expert":
            ``[M]``. float32 (float64 for float64 rows).
        bias: ``[T, hidden]``, added once.
        async_op: return at once.

    Returns:
        ``[T, hidden]``; ``[T, topk]``, 0 where an id is -1; the event after which they may be used, None
        without ``async_op``.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device.
        HandleError, PeerTimeout: as combine.
    """
    given = [None if t is None else checks.resolved(t) for t in (y, bias)]
    assert given[0] is not None
    values = checks.resolved(values).contiguous()
    call = Combine(given[0], None, given[1], values, handle._plan, handle._grouped)
    (out, back), event = ops.combine(handle._ep._attachment, call, async_op)
    assert back is not None
    return out, back, event
