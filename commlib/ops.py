"""``torch.ops.commlib.*``: dispatch, redispatch (with a known routing) and combine.

The ops take and return plain tensors, so autograd, ``torch.compile`` and activation checkpointing see
ordinary functions. Dispatch and combine are each other's adjoints, and the gradients are written with the
ops themselves. A tensor names the communicator, since ops cannot take Python objects. Tensors are checked
here, whatever calls: the core takes addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib import _core, checks, compiling, shapes
from commlib.communicator import Attachment, Communicator, attachment_of
from commlib.errors import CapacityExceeded
from commlib.formats import OWN, format_of
from commlib.settings import CORE_DTYPES


class RoutePlan(NamedTuple):
    """What a dispatch found out, as tensors: all that later operations on the same routing need.

    Nothing else holds those that are read again: ids, routes, groups, and local with layout="expert".
    """

    topk_idx: Tensor  # [T, K] global expert ids
    routes: Tensor  # [T, min(K, R)] rank << 32 | row at that rank, ascending; -1 ends
    local: Tensor  # [N, K] layout="rank": local expert ids; "expert": rows of d.x; -1: another rank's
    source: Tensor  # [N, 2] or [M, 2]: its length is that of d.x
    groups: Tensor  # tokens_per_expert [E_loc]; with layout="expert", offsets [E_loc + 1] follow
    comm: Tensor  # [], see Attachment.name


_ROUTING = (
    "Tensor topk_idx, Tensor routes, Tensor local, Tensor source, Tensor groups, Tensor comm, bool grouped"
)

# torch.compile(mode="reduce-overhead") leaves such ops out of its CUDA graphs. Older PyTorch knows no tag.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))

_library = torch.library.Library("commlib", "DEF")
_DISPATCH = (
    "(Tensor x, Tensor topk_idx, Tensor? topk_weights, Tensor comm, int width, int experts, bool grouped, "
    "int align, bool drop, bool zero_copy, bool async_op, bool in_waves, Tensor? scales) -> "
)
_library.define(f"dispatch{_DISPATCH} ({', '.join(['Tensor'] * 8)})", tags=_TAGS)
# For torch.compile: its back end mistakes one size for another where an op with an effect returns a tuple of
# tensors whose sizes are known only at run time. In eager mode autograd takes longer for a list.
_library.define(f"traced_dispatch{_DISPATCH} Tensor[]", tags=_TAGS)
_library.define(
    f"redispatch(Tensor x, Tensor? topk_weights, {_ROUTING}, bool zero_copy, bool async_op, "
    "Tensor? scales) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    f"combine(Tensor y, Tensor? weights, Tensor? bias, Tensor? weight_grads, {_ROUTING}, "
    "bool async_op) -> (Tensor, Tensor)",
    tags=_TAGS,
)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_stride(tensor: Tensor) -> int:
    """Bytes from row to row."""
    return tensor.stride(0) * tensor.element_size()


def _rows(
    x: Tensor, weights: Tensor | None, scales: Tensor | None = None, format: _core.RowFormat = OWN
) -> _core.Rows:
    rows = x.data_ptr(), _row_stride(x), x.shape[0], weights is not None, _address(weights)
    if format is OWN:
        return _core.Rows(*rows)
    return _core.Rows(*rows, _address(scales), 0 if scales is None else _row_stride(scales), format)


def _in_memory(
    c: Communicator, size: int, format: _core.RowFormat, x: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Memory for received rows like ``x``, and for their scales: nothing where there are none."""
    rows = c.new_rows(size, format, x)
    if scales is None:
        return rows, c.backend.nothing()
    return rows, c.backend.empty(size, scales.shape[1], dtype=scales.dtype)


def _in_slot(
    c: Communicator,
    lease: _core.SlotLease,
    size: int,
    format: _core.RowFormat,
    x: Tensor,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same, where they have been received."""
    rows = c.view_like(lease, size, format, x)
    if scales is None:
        return rows, c.backend.nothing()
    return rows, c.view_scales(lease, size, format, scales)


def known_routing(r: RoutePlan, grouped: bool) -> _core.RoutePlan:
    """The core's view of a routing that a dispatch has found."""
    return _core.RoutePlan(
        r.topk_idx.data_ptr(),
        r.routes.data_ptr(),
        r.routes.shape[0],
        r.local.shape[0],
        r.local.data_ptr() if grouped else 0,
        *_addresses_of_groups(r.groups, grouped),
    )


def _addresses_of_groups(groups: Tensor, grouped: bool) -> tuple[int, int]:
    """Of offsets, 0 where there are none, and of tokens_per_expert."""
    begin = groups.data_ptr()
    return (begin + groups.shape[0] // 2 * groups.element_size() if grouped else 0), begin


def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    comm: Tensor,
    width: int,
    experts: int,
    grouped: bool,
    align: int,
    drop: bool,
    zero_copy: bool,
    async_op: bool,
    in_waves: bool,
    scales: Tensor | None,
) -> tuple[Tensor, ...]:
    a = attachment_of(comm)
    c = a.communicator
    checks.check_dispatch(c, x, scales, topk_idx, topk_weights, align, (width, experts))
    format = OWN if scales is None else format_of(c.settings, x, scales)
    tokens, topk = topk_idx.shape
    routes = c.backend.empty(tokens, width)
    groups = c.backend.empty(2 * experts + 1 if grouped else experts)
    view = _core.RoutePlan(
        topk_idx.data_ptr(),
        routes.data_ptr(),
        tokens,
        0,  # rows, and places: not known yet
        0,
        *_addresses_of_groups(groups, grouped),
        align,
    )
    pending = _begin_dispatch(a, view, topk_weights is not None, drop, in_waves, format)
    backend = c.backend
    try:
        size = pending.results
        local = backend.empty(pending.rows, topk)
        source = backend.empty(size, 2)
        weights = c.new_weights(topk_weights, size, grouped)
        in_slot = zero_copy or (not grouped and c.can_spare_slots(0))
        if in_slot:
            rows, new_scales = _in_slot(c, pending.lease, size, format, x, scales)
        else:
            rows, new_scales = _in_memory(c, size, format, x, scales)
        received = _core.Received(
            None if in_slot else rows.data_ptr(),
            weights.data_ptr(),
            0 if grouped else local.data_ptr(),
            source.data_ptr(),
            new_scales.data_ptr(),
        )
        routing = RoutePlan(topk_idx, routes, local, source, groups, comm)
        keep = (x, topk_weights, scales, rows, weights, new_scales, *routing[:-1])
        backend.begin()
        ticket = c.core.finish_dispatch(
            pending,
            _rows(x, topk_weights, scales, format),
            known_routing(routing, grouped),
            received,
            async_op,
            keep if async_op else None,
        )
    except BaseException as error:
        backend.give_up(f"rank {c.rank} failed between counts and rows of a dispatch: {error!r}")
        raise
    counts = backend.copied(groups)
    a.count(dispatches=1, rows_received=pending.rows, dropped=pending.dropped)
    a.event = backend.end("dispatch", ticket, (*keep, counts), async_op)
    if in_waves and a.event is not None:
        a.event.waves = pending
    return rows, weights, counts, routes, local, source, groups, new_scales


def _begin_dispatch(
    a: Attachment,
    view: _core.RoutePlan,
    weighted: bool,
    drop: bool,
    in_waves: bool,
    format: _core.RowFormat,
) -> _core.PendingDispatch:
    """Publish to the other ranks what goes where; where the communicator grows, make room for what comes."""
    c = a.communicator
    try:
        c.backend.begin_plan()
        drop = drop and not c.settings.grows
        return c.core.begin_dispatch(view, weighted, drop, in_waves, a.caller, format)
    except CapacityExceeded as error:  # on all ranks, with the same number; nothing was sent
        if not c.settings.grows:
            raise
        c.make_room(error.rows)
    c.backend.begin_plan()
    return c.core.begin_dispatch(view, weighted, False, in_waves, a.caller, format)


def _redispatch(
    x: Tensor,
    topk_weights: Tensor | None,
    topk_idx: Tensor,
    routes: Tensor,
    local: Tensor,
    source: Tensor,
    groups: Tensor,
    comm: Tensor,
    grouped: bool,
    zero_copy: bool,
    async_op: bool,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    a = attachment_of(comm)
    c = a.communicator
    routing = RoutePlan(topk_idx, routes, local, source, groups, comm)
    checks.check_redispatch(c, x, scales, topk_weights, routing, grouped)
    format = format_of(c.settings, x, scales)
    size = source.shape[0]
    weights = c.new_weights(topk_weights, size, grouped)
    in_slot = zero_copy or (not grouped and c.can_spare_slots(1))
    rows, new_scales = (None, None) if in_slot else _in_memory(c, size, format, x, scales)
    keep = (x, topk_weights, scales, rows, weights, new_scales, *routing[:-1])
    c.backend.begin()
    ticket, lease = c.core.redispatch(
        _rows(x, topk_weights, scales, format),
        known_routing(routing, grouped),
        _core.Received(
            None if rows is None else rows.data_ptr(), weights.data_ptr(), scales=_address(new_scales)
        ),
        async_op,
        keep if async_op else None,
        a.caller,
    )
    if rows is None or new_scales is None:
        rows, new_scales = _in_slot(c, lease, size, format, x, scales)
    a.count(redispatches=1, rows_received=local.shape[0])
    a.event = c.backend.end("redispatch", ticket, (rows, *keep), async_op)
    return rows, weights, new_scales


def _combine(
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    weight_grads: Tensor | None,
    topk_idx: Tensor,
    routes: Tensor,
    local: Tensor,
    source: Tensor,
    groups: Tensor,
    comm: Tensor,
    grouped: bool,
    async_op: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    a = attachment_of(comm)
    c = a.communicator
    routing = RoutePlan(topk_idx, routes, local, source, groups, comm)
    checks.check_combine(c, y, weights, bias, weight_grads, routing, grouped)
    format = format_of(c.settings, y)
    if out is None:
        out = c.new_rows(routes.shape[0], format, y)
    if weight_grads is None:
        out_weights = c.backend.nothing()
    else:
        out_weights = c.backend.empty(*topk_idx.shape, dtype=c.weight_dtype)
    given = _core.CombineInput(
        y.data_ptr(),
        _row_stride(y),
        _address(weights),
        weight_grads is not None,
        _address(weight_grads),
        _address(bias),
        0 if bias is None else _row_stride(bias),
        *(() if format is OWN else (format, CORE_DTYPES[y.dtype])),
    )
    keep = (y, weights, bias, weight_grads, out, out_weights, *routing[:-1])
    c.backend.begin()
    ticket = c.core.combine(
        given,
        known_routing(routing, grouped),
        out.data_ptr(),
        out_weights.data_ptr() if weight_grads is not None else 0,
        async_op,
        keep if async_op else None,
        a.caller,
    )
    a.count(combines=1)
    a.event = c.backend.end("combine", ticket, keep, async_op)
    return out, out_weights


# Gradients.


def dispatch_adjoint(
    routing: Sequence[Tensor], grouped: bool, g_rows: Tensor, g_weights: Tensor | None, async_op: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and topk_weights: a combine along the same routes."""
    weight_grads = None if g_weights is None else g_weights.contiguous()
    gx, gw = combine(g_rows.contiguous(), None, None, weight_grads, *routing, grouped, async_op)
    return gx, None if g_weights is None else gw


def combine_adjoint(
    routing: Sequence[Tensor],
    grouped: bool,
    g_out: Tensor,
    g_out_weights: Tensor | None,
    async_op: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rows of the output's gradient, and gradients of weights sent back: a dispatch along the routes."""
    weights = None if g_out_weights is None else g_out_weights.contiguous()
    rows, g_weight_grads, _ = redispatch(
        g_out.contiguous(), weights, *routing, grouped, False, async_op, None
    )
    return rows, None if g_out_weights is None else g_weight_grads


def gradients_of_rows(
    rows: Tensor, y: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of y and of its weights, from rows of the output's gradient."""
    if y is None or weights is None:
        return rows, None
    wide = rows.to(weights.dtype)
    return (wide * weights.unsqueeze(-1)).to(rows.dtype), (wide * y.to(weights.dtype)).sum(-1)


def _setup_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, topk_idx, topk_weights, comm, _, _, ctx.grouped, *_ = inputs
    ctx.has_weights = topk_weights is not None
    ctx.save_for_backward(topk_idx, *output[3:7], comm)
    compiling.save_results()


def _dispatch_backward(ctx: Any, g_rows: Tensor, g_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    weights = g_weights if ctx.has_weights else None
    gx, gw = dispatch_adjoint(ctx.saved_tensors, ctx.grouped, g_rows, weights)
    return gx, None, gw, *(None,) * 10


def _setup_redispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, topk_weights, *routing, ctx.grouped, _, _, _ = inputs
    ctx.has_weights = topk_weights is not None
    ctx.save_for_backward(*routing)
    compiling.save_results()


def _redispatch_backward(ctx: Any, g_rows: Tensor, g_weights: Tensor, _: Tensor) -> tuple[Any, ...]:
    weights = g_weights if ctx.has_weights else None
    gx, gw = dispatch_adjoint(ctx.saved_tensors, ctx.grouped, g_rows, weights)
    return gx, gw, *(None,) * 10


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    y, weights, bias, weight_grads, *routing, ctx.grouped, _ = inputs
    ctx.has_bias = bias is not None
    ctx.has_weight_grads = weight_grads is not None
    weighted = () if weights is None else (y, weights)
    ctx.save_for_backward(*routing, *weighted)
    compiling.save_results()


def _combine_backward(ctx: Any, g_out: Tensor, g_out_weights: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second read
    routing, weighted = saved[: len(RoutePlan._fields)], saved[len(RoutePlan._fields) :]
    weights = g_out_weights if ctx.has_weight_grads else None
    rows, g_weight_grads = combine_adjoint(routing, ctx.grouped, g_out, weights)
    gy, gw = gradients_of_rows(rows, *weighted)
    return (
        gy,
        gw,
        g_out if ctx.has_bias else None,
        g_weight_grads,
        *(None,) * 8,
    )


# What PyTorch has to know of each op.


def _register(name: str, kernel: Any, fake: Any, backward: Any, setup_context: Any) -> Any:
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    qualified = f"commlib::{name}"
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    torch.library.register_vmap(qualified, compiling.refuse_vmap)
    return getattr(torch.ops.commlib, name).default


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _past_autograd(op: Any, inputs: int, traced: Any = None) -> Callable[..., Any]:
    """``op`` past autograd where nothing wants a gradient: small operations are noticeably faster.

    Args:
        inputs: how many arguments may require grad, the first ones.
        traced: the op for torch.compile, if it is another.
    """
    traced = traced or op

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return traced(*arguments)
        if wants_gradient(*arguments[:inputs]):
            return op(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


_dispatch_op = _register("dispatch", _dispatch, shapes.dispatch, _dispatch_backward, _setup_dispatch)
_traced_dispatch = _register(
    "traced_dispatch",
    lambda *arguments: list(_dispatch(*arguments)),
    lambda *arguments: list(shapes.dispatch(*arguments)),
    lambda ctx, grads: _dispatch_backward(ctx, *grads),
    _setup_dispatch,
)
_redispatch_op = _register(
    "redispatch", _redispatch, shapes.redispatch, _redispatch_backward, _setup_redispatch
)
_combine_op = _register("combine", _combine, shapes.combine, _combine_backward, _setup_combine)
for _op in (_traced_dispatch, _redispatch_op, _combine_op):
    compiling.keep_in_order(_op)

dispatch = _past_autograd(_dispatch_op, 3, _traced_dispatch)
redispatch = _past_autograd(_redispatch_op, 2)
combine = _past_autograd(_combine_op, 4)


def combine_into(out: Tensor, arguments: tuple[Any, ...]) -> None:
    """combine, written into ``out``; not differentiable. Autograd learns that ``out`` has changed."""
    if torch.compiler.is_compiling():
        out.copy_(combine(*arguments)[0])
        return
    checks.check_apart(out, arguments)
    implementation: Callable[..., Any] = _combine
    implementation(*arguments, out=out)
    torch.autograd.graph.increment_version(out)
