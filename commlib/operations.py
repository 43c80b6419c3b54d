"""Issue operations: check what the core will read, make room for results, call it.

Whatever calls, the façade, an op of PyTorch or a gradient, comes through here: the core takes addresses.
Each function returns the results, and with ``async_op`` the event after which they may be used.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from commlib import _core, checks
from commlib.calls import (
    Arrived,
    Combine,
    Combined,
    Dispatch,
    Rearrived,
    Redispatch,
    RoutePlan,
    words_of_groups,
)
from commlib.communicator import Attachment, Communicator, refuse_forward_mode
from commlib.errors import CapacityExceeded, CommError
from commlib.event import Event
from commlib.formats import CORE_DTYPES, Sent
from commlib.quantization import numbered, quantize

_Sends = TypeVar("_Sends", Dispatch, Redispatch)
_COPYING = _core.Weighing()  # of rows that come as they are


def dispatch(
    a: Attachment, call: Dispatch, async_op: bool = False, in_waves: bool = False
) -> tuple[Arrived, Event | None]:
    """Send each token to the ranks of its experts, once they have agreed on what goes where."""
    _check_callable(a)
    if call.bounded:
        return _dispatch_bounded(a, call, async_op)
    c, grouped = a.communicator, call.grouped
    checks.check_dispatch(c, call)
    call = _converted(c, call)
    sent = c.sent(call.x, call.scales, call.quantize)
    routes, places, groups, view = _begun_plan(c, call)
    pending = _begin(a, call, view, in_waves, sent.format)
    backend = c.backend  # from here on: another one, where the communicator has grown
    try:
        size = pending.results
        local, source = backend.empty(pending.rows, c.settings.topk), backend.empty(size, 2)
        weights = None if call.topk_weights is None else c.new_weights(size, grouped)
        in_slot = pending.grouped_in_slot if grouped else call.zero_copy or c.can_spare_slots(0)
        if in_slot:
            rows, scales = _in_slot(c, size, sent, pending.lease)
        else:
            rows, scales = _in_memory(c, size, sent)
        local_at = local.data_ptr()
        view.complete(pending.rows, local_at if grouped else 0)
        received = _core.Received(
            None if in_slot else rows.data_ptr(),
            _address(weights),
            0 if grouped else local_at,
            source.data_ptr(),
            _address(scales),
        )
        read = call.topk_idx, routes, local, source, groups, places
        keep = (call.x, call.topk_weights, call.scales, rows, weights, scales, *read)
        backend.begin()
        given = rows_of(call.x, call.topk_weights, call.scales, sent)
        kept = keep if async_op else None
        ticket = c.core.finish_dispatch(pending, given, view, received, async_op, kept)
        counts = backend.copied(groups)
    except BaseException as error:
        backend.give_up(f"rank {c.rank} failed between counts and rows of a dispatch: {error!r}")
        raise
    a.count(dispatches=1, rows_received=pending.rows, dropped=pending.dropped)
    event = backend.end("dispatch", ticket, (*keep, counts), async_op)
    if in_waves and event is not None:
        event.waves = pending
    return Arrived(rows, weights, counts, routes, local, source, groups, places, scales, view), event


def _dispatch_bounded(a: Attachment, call: Dispatch, async_op: bool) -> tuple[Arrived, Event | None]:
    """Send each token likewise, to results of one size: nobody waits to hear how many rows come."""
    c, grouped, size = a.communicator, call.grouped, call.results
    checks.check_dispatch(c, call)
    call = _converted(c, call)
    backend = c.backend
    sent = c.sent(call.x, call.scales, call.quantize)
    routes, places, groups, view = _begun_plan(c, call)
    local, source = backend.empty(call.capacity, c.settings.topk), backend.empty(size, 2)
    weights = None if call.topk_weights is None else c.new_weights(size, grouped)
    in_slot = _may_stay(c, call, size)
    rows, scales = (None, None) if in_slot else _in_memory(c, size, sent)
    view.complete(call.capacity, local.data_ptr() if grouped else 0)
    read = call.topk_idx, routes, local, source, groups, places
    later = async_op and not backend.ordered  # counts are not known before the operation is done
    counts = backend.empty(groups.shape[0]) if later else None
    keep = (call.x, call.topk_weights, call.scales, rows, weights, scales, *read, counts)
    backend.begin_plan(awaited=False)
    backend.begin()
    ticket, lease = c.core.dispatch_bounded(
        rows_of(call.x, call.topk_weights, call.scales, sent),
        view,
        _core.Received(
            None if rows is None else rows.data_ptr(),
            _address(weights),
            0 if grouped else local.data_ptr(),
            source.data_ptr(),
            _address(scales),
            zero_rest=call.zero_rest,
            groups=_address(counts),
            groups_words=groups.shape[0],
        ),
        call.drop,
        async_op,
        backend.held(keep, read, async_op),
        a.caller,
    )
    if rows is None:
        rows, scales = _in_slot(c, size, sent, lease)
    if counts is None:
        counts = backend.copied(groups)
    a.count(dispatches=1)
    event = backend.end("dispatch", ticket, (rows, scales, *keep, counts), async_op)
    return Arrived(rows, weights, counts, routes, local, source, groups, places, scales, view), event


def _converted(c: Communicator, call: _Sends) -> _Sends:
    """The same call, of rows that are quantized already where the core does not do it on their way."""
    if call.quantize == 0 or c.converts:
        return call
    rows, scales = quantize(call.x, numbered(call.quantize).name)
    return call._replace(x=rows, scales=scales, quantize=0)


def _check_callable(a: Attachment) -> None:
    """That the attachment is open, and that no one asks for tangents, for which there is no rule."""
    refuse_forward_mode()
    a.check_open()
    if a.communicator.settings.grows and a.communicator.backend.is_captured():
        raise CommError(
            "an ExpertParallel without max_tokens grows, and a CUDA graph would be left behind with its old "
            "memory: give max_tokens to capture operations"
        )


def _begun_plan(c: Communicator, call: Dispatch) -> tuple[Tensor, Tensor | None, Tensor, _core.RoutePlan]:
    """Routes, places, groups and the core's view of a plan, which the core is to fill in."""
    tokens = call.topk_idx.shape[0]
    routes = c.backend.empty(tokens, c.width)
    places = c.backend.empty(tokens, c.settings.topk) if call.grouped else None
    totals = words_of_groups(c.experts, call.grouped)
    groups = c.backend.empty(totals + 2 if call.bounded else totals)
    view = _core.RoutePlan(
        call.topk_idx.data_ptr(),
        routes.data_ptr(),
        _address(places),
        tokens,
        0,  # rows, and which of them go where: not known yet
        0,
        *_addresses_of_groups(groups, c.experts, call.grouped),
        call.align,
        *(
            (call.fixed, _entry(groups, totals), call.results, call.most_rows, call.padded)
            if call.bounded
            else ()
        ),
    )
    return routes, places, groups, view


def _begin(
    a: Attachment, call: Dispatch, view: _core.RoutePlan, in_waves: bool, format: _core.RowFormat
) -> _core.PendingDispatch:
    """Publish to the other ranks what goes where; where the communicator grows, make room for what comes."""
    c, weighted = a.communicator, call.topk_weights is not None
    grows = c.settings.grows
    # Grouped rows come straight to their places where they can stay there; else one by one for each rank.
    in_slot = call.grouped and c.groups_in_slots and (call.zero_copy or c.can_spare_slots(1))
    rest = in_waves, in_slot, a.caller, format
    try:
        c.backend.begin_plan(awaited=True)
        return c.core.begin_dispatch(view, weighted, call.drop and not grows, *rest)
    except CapacityExceeded as error:  # on all ranks, with the same number; nothing was sent
        if not grows:
            raise
        c.make_room(error.rows)
    c.backend.begin_plan(awaited=True)
    return c.core.begin_dispatch(view, weighted, False, *rest)


def redispatch(a: Attachment, call: Redispatch, async_op: bool = False) -> tuple[Rearrived, Event | None]:
    """Send rows where those of an earlier dispatch went: no plan, and no counts."""
    _check_callable(a)
    c, plan, grouped = a.communicator, call.plan, call.grouped
    view = _checked_view(c, plan, grouped)
    checks.check_redispatch(c, call)
    call = _converted(c, call)
    sent = c.sent(call.x, call.scales, call.quantize)
    size = plan.source.shape[0]
    weights = None if call.topk_weights is None else c.new_weights(size, grouped)
    weighs = call.y is not None
    # Rows that are weighed on the way to their groups come once to each rank, and are read but once.
    in_slot = not weighs and _may_stay(c, call, size)
    rows, scales = (None, None) if in_slot else _in_memory(c, size, sent)
    dots = c.backend.empty(size, dtype=c.weight_dtype) if weighs else None
    weighed = call.y, call.y_weights, dots
    keep = (call.x, call.topk_weights, call.scales, rows, weights, scales, *weighed, *plan.tensors)
    c.backend.begin()
    ticket, lease = c.core.redispatch(
        rows_of(call.x, call.topk_weights, call.scales, sent),
        view,
        _core.Received(
            None if rows is None else rows.data_ptr(),
            _address(weights),
            scales=_address(scales),
            count=size,
            weighing=_weighing_of(*weighed),
            zero_rest=True,
        ),
        async_op,
        c.backend.held(keep, plan.tensors, async_op),
        a.caller,
    )
    if rows is None:
        rows, scales = _in_slot(c, size, sent, lease)
    a.count(redispatches=1, rows_received=0 if plan.bounded(c.experts, grouped) else plan.local.shape[0])
    event = c.backend.end("redispatch", ticket, (rows, scales, *keep), async_op)
    return Rearrived(rows, weights, scales, dots), event


def combine(
    a: Attachment, call: Combine, async_op: bool = False, out: Tensor | None = None
) -> tuple[Combined, Event | None]:
    """Sum the experts' rows of each token at its own rank; ``out``: memory for the sums."""
    _check_callable(a)
    c, plan = a.communicator, call.plan
    view = _checked_view(c, plan, call.grouped)
    checks.check_combine(c, call)
    sent = c.sent(call.y)
    if out is None:
        out = c.new_rows(plan.routes.shape[0], sent)
    back = None
    if call.weight_grads is not None:
        back = c.backend.empty(*plan.topk_idx.shape, dtype=c.weight_dtype)
    given = _core.CombineInput(
        call.y.data_ptr(),
        call.y.shape[0],
        _row_stride(call.y),
        _address(call.weights),
        back is not None,
        _address(call.weight_grads),
        _address(call.bias),
        0 if call.bias is None else _row_stride(call.bias),
        *(() if sent is c.own else (sent.format, CORE_DTYPES[call.y.dtype])),
    )
    keep = (call.y, call.weights, call.bias, call.weight_grads, out, back, *plan.tensors)
    c.backend.begin()
    ticket = c.core.combine(
        given,
        view,
        out.data_ptr(),
        _address(back),
        async_op,
        c.backend.held(keep, plan.tensors, async_op),
        a.caller,
    )
    a.count(combines=1)
    return Combined(out, back), c.backend.end("combine", ticket, keep, async_op)


def _may_stay(c: Communicator, call: Dispatch | Redispatch, size: int) -> bool:
    """Whether results of a known size stay in the slot where they come in."""
    if call.grouped and not c.can_group_in_slot(size):
        return False
    return call.zero_copy or c.can_spare_slots(1)


def _in_memory(c: Communicator, size: int, sent: Sent) -> tuple[Tensor, Tensor | None]:
    """Memory that the user will own for received rows, and for scales where some come."""
    return c.new_rows(size, sent), c.new_scales(size, sent)


def _in_slot(c: Communicator, size: int, sent: Sent, lease: _core.SlotLease) -> tuple[Tensor, Tensor | None]:
    """The same in the slot where they come in."""
    return c.view(lease, size, sent), c.view_scales(lease, size, sent)


def rows_of(x: Tensor, weights: Tensor | None, scales: Tensor | None, sent: Sent) -> _core.Rows:
    """The core's view of rows to send."""
    rows = x.data_ptr(), _row_stride(x), x.shape[0], weights is not None, _address(weights)
    if sent.format.is_own:
        return _core.Rows(*rows)
    stride = 0 if scales is None else _row_stride(scales)
    return _core.Rows(*rows, _address(scales), stride, sent.format, sent.conversion)


def _weighing_of(y: Tensor | None, weights: Tensor | None, dots: Tensor | None) -> _core.Weighing:
    if y is None:
        return _COPYING
    return _core.Weighing(
        y.data_ptr(), _row_stride(y), _address(weights), _address(dots), CORE_DTYPES[y.dtype]
    )


def view_of(plan: RoutePlan, experts: int, grouped: bool) -> _core.RoutePlan:
    """The core's view of a routing that a dispatch has found, at a rank with so many experts."""
    totals = words_of_groups(experts, grouped)
    bounded = plan.bounded(experts, grouped)
    return _core.RoutePlan(
        plan.topk_idx.data_ptr(),
        plan.routes.data_ptr(),
        _address(plan.places),
        plan.routes.shape[0],
        plan.local.shape[0],
        plan.local.data_ptr() if grouped else 0,
        *_addresses_of_groups(plan.groups, experts, grouped),
        totals=_entry(plan.groups, totals) if bounded else 0,
        results=plan.source.shape[0] if bounded else 0,
    )


def _checked_view(c: Communicator, plan: RoutePlan, grouped: bool) -> _core.RoutePlan:
    """The core's view, of a plan that may be anything where it has none yet."""
    if plan.view is not None:
        return plan.view
    checks.check_plan(c, plan, grouped)
    return view_of(plan, c.experts, grouped)


def _addresses_of_groups(groups: Tensor, experts: int, grouped: bool) -> tuple[int, int]:
    """Of offsets, 0 where there are none, and of tokens_per_expert."""
    return (_entry(groups, experts) if grouped else 0), groups.data_ptr()


def _entry(tensor: Tensor, i: int) -> int:
    """The address of a contiguous tensor's element."""
    return tensor.data_ptr() + i * tensor.element_size()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_stride(tensor: Tensor) -> int:
    """Bytes from row to row."""
    return tensor.stride(0) * tensor.element_size()
