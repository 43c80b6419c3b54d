"""``torch.ops.commlib.*``: dispatch, redispatch (with a known routing) and combine.

The ops take and return plain tensors, so autograd, ``torch.compile`` and activation checkpointing see
ordinary functions. Dispatch and combine are each other's adjoints, and the gradients are written with the
ops themselves. A communicator is named by a number, since ops cannot take Python objects.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from commlib import _core

if TYPE_CHECKING:
    from commlib.expert_parallel import ExpertParallel

communicators: weakref.WeakValueDictionary[int, ExpertParallel] = weakref.WeakValueDictionary()


class Routing(NamedTuple):
    """What a dispatch found out, as tensors: all that later operations on the same routing need."""

    topk_idx: Tensor  # [T, K] global expert ids
    routes: Tensor  # [T, min(K, R)] rank << 32 | row at that rank, ascending; -1 ends
    local: Tensor  # [N, K] layout="rank": local expert ids; "expert": rows of d.x; -1: another rank's
    source: Tensor  # [N, 2] or [M, 2]: its length is that of d.x
    tokens_per_expert: Tensor  # [E_loc]
    offsets: Tensor  # [E_loc + 1] with layout="expert", else [0]


_ROUTING = (
    "Tensor topk_idx, Tensor routes, Tensor local, Tensor source, Tensor tokens_per_expert, "
    "Tensor offsets, int comm, bool grouped"
)

# torch.compile(mode="reduce-overhead") leaves such ops out of its CUDA graphs. Older PyTorch knows no tag.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))

_library = torch.library.Library("commlib", "DEF")
_library.define(
    "dispatch(Tensor x, Tensor topk_idx, Tensor? topk_weights, int comm, bool grouped, int align, "
    "bool drop, bool zero_copy, bool async_op, bool in_waves) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    f"redispatch(Tensor x, Tensor? topk_weights, {_ROUTING}, bool zero_copy, bool async_op) "
    "-> (Tensor, Tensor)",
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


def _rows(x: Tensor, weights: Tensor | None) -> _core.Rows:
    return _core.Rows(x.data_ptr(), _row_stride(x), x.shape[0], weights is not None, _address(weights))


def _routing_view(r: Routing, grouped: bool) -> _core.RoutingView:
    return _core.RoutingView(
        r.topk_idx.data_ptr(),
        r.routes.data_ptr(),
        r.routes.shape[0],
        r.local.shape[0],
        r.local.data_ptr() if grouped else 0,
        r.offsets.data_ptr(),
        r.tokens_per_expert.data_ptr(),
    )


def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    comm: int,
    grouped: bool,
    align: int,
    drop: bool,
    zero_copy: bool,
    async_op: bool,
    in_waves: bool,
) -> tuple[Tensor, ...]:
    ep = communicators[comm]
    core = ep._core
    tokens, topk = topk_idx.shape
    backend = ep._backend
    experts = ep.num_local_experts
    routes = backend.empty(tokens, ep._width)
    tokens_per_expert = backend.empty(experts)
    offsets = backend.empty(experts + 1 if grouped else 0)
    view = _core.RoutingView(
        topk_idx.data_ptr(),
        routes.data_ptr(),
        tokens,
        0,  # rows, and places: not known yet
        0,
        offsets.data_ptr(),
        tokens_per_expert.data_ptr(),
        align,
    )
    backend.begin_plan()
    pending = core.begin_dispatch(view, topk_weights is not None, drop, in_waves)
    try:
        size = pending.results
        local = backend.empty(pending.rows, topk)
        source = backend.empty(size, 2)
        weights = ep._new_weights(topk_weights, size, grouped)
        in_slot = zero_copy or (not grouped and ep._can_spare_slots(0))
        rows = ep._view(pending.lease, size) if in_slot else ep._new_rows(size)
        routing = Routing(topk_idx, routes, local, source, tokens_per_expert, offsets)
        received = _core.Received(
            None if in_slot else rows.data_ptr(),
            weights.data_ptr(),
            0 if grouped else local.data_ptr(),
            source.data_ptr(),
        )
        keep = (x, topk_weights, rows, weights, *routing)
        backend.begin()
        ticket = core.finish_dispatch(
            pending,
            _rows(x, topk_weights),
            _routing_view(routing, grouped),
            received,
            async_op,
            keep if async_op else None,
        )
    except BaseException as error:
        backend.give_up(f"rank {ep.rank} failed between counts and rows of a dispatch: {error!r}")
        raise
    ep._count(dispatches=1, rows_received=pending.rows, dropped=pending.dropped)
    ep._event = backend.end("dispatch", ticket, keep, async_op)
    if in_waves and ep._event is not None:
        ep._event.waves = pending
    return rows, weights, routes, local, source, tokens_per_expert, offsets


def _redispatch(
    x: Tensor,
    topk_weights: Tensor | None,
    topk_idx: Tensor,
    routes: Tensor,
    local: Tensor,
    source: Tensor,
    tokens_per_expert: Tensor,
    offsets: Tensor,
    comm: int,
    grouped: bool,
    zero_copy: bool,
    async_op: bool,
) -> tuple[Tensor, Tensor]:
    ep = communicators[comm]
    routing = Routing(topk_idx, routes, local, source, tokens_per_expert, offsets)
    size = source.shape[0]
    weights = ep._new_weights(topk_weights, size, grouped)
    in_slot = zero_copy or (not grouped and ep._can_spare_slots(1))
    out = None if in_slot else ep._new_rows(size)
    keep = (x, topk_weights, out, weights, *routing)
    ep._backend.begin()
    ticket, lease = ep._core.redispatch(
        _rows(x, topk_weights),
        _routing_view(routing, grouped),
        _core.Received(None if out is None else out.data_ptr(), weights.data_ptr()),
        async_op,
        keep if async_op else None,
    )
    rows = ep._view(lease, size) if out is None else out
    ep._count(redispatches=1, rows_received=local.shape[0])
    ep._event = ep._backend.end("redispatch", ticket, (rows, *keep), async_op)
    return rows, weights


def _combine(
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    weight_grads: Tensor | None,
    topk_idx: Tensor,
    routes: Tensor,
    local: Tensor,
    source: Tensor,
    tokens_per_expert: Tensor,
    offsets: Tensor,
    comm: int,
    grouped: bool,
    async_op: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    ep = communicators[comm]
    routing = Routing(topk_idx, routes, local, source, tokens_per_expert, offsets)
    if out is None:
        out = ep._new_rows(routes.shape[0])
    shape = topk_idx.shape if weight_grads is not None else (0,)
    out_weights = ep._backend.empty(*shape, dtype=ep.settings.weight_dtype)
    given = _core.CombineInput(
        y.data_ptr(),
        _row_stride(y),
        _address(weights),
        weight_grads is not None,
        _address(weight_grads),
        _address(bias),
        0 if bias is None else _row_stride(bias),
    )
    keep = (y, weights, bias, weight_grads, out, out_weights, *routing)
    ep._backend.begin()
    ticket = ep._core.combine(
        given,
        _routing_view(routing, grouped),
        out.data_ptr(),
        out_weights.data_ptr() if weight_grads is not None else 0,
        async_op,
        keep if async_op else None,
    )
    ep._count(combines=1)
    ep._event = ep._backend.end("combine", ticket, keep, async_op)
    return out, out_weights


for _device in ("CPU", "CUDA"):
    _library.impl("dispatch", _dispatch, _device)
    _library.impl("redispatch", _redispatch, _device)
    _library.impl("combine", _combine, _device)


# Shapes for torch.compile: how many rows arrive is known at run time only.


def _fake_weights(given: Tensor | None, size: Any, grouped: bool, topk: int, x: Tensor) -> Tensor:
    if given is None:
        return x.new_empty(0, dtype=torch.float32)
    return given.new_empty((size,) if grouped else (size, topk))


@torch.library.register_fake("commlib::dispatch")
def _fake_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    comm: int,
    grouped: bool,
    align: int,
    drop: bool,
    zero_copy: bool,
    async_op: bool,
    in_waves: bool,
) -> tuple[Tensor, ...]:
    ep = communicators[comm]
    context = torch.library.get_ctx()
    unique = context.new_dynamic_size()
    size = context.new_dynamic_size() if grouped else unique
    tokens, topk = topk_idx.shape
    return (
        x.new_empty(size, x.shape[1]),
        _fake_weights(topk_weights, size, grouped, topk, x),
        topk_idx.new_empty(tokens, ep._width),
        topk_idx.new_empty(unique, topk),
        topk_idx.new_empty(size, 2),
        topk_idx.new_empty(ep.num_local_experts),
        topk_idx.new_empty(ep.num_local_experts + 1 if grouped else 0),
    )


@torch.library.register_fake("commlib::redispatch")
def _fake_redispatch(
    x: Tensor,
    topk_weights: Tensor | None,
    topk_idx: Tensor,
    routes: Tensor,
    local: Tensor,
    source: Tensor,
    tokens_per_expert: Tensor,
    offsets: Tensor,
    comm: int,
    grouped: bool,
    zero_copy: bool,
    async_op: bool,
) -> tuple[Tensor, Tensor]:
    size, topk = source.shape[0], topk_idx.shape[1]
    return x.new_empty(size, x.shape[1]), _fake_weights(topk_weights, size, grouped, topk, x)


@torch.library.register_fake("commlib::combine")
def _fake_combine(
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    weight_grads: Tensor | None,
    topk_idx: Tensor,
    routes: Tensor,
    local: Tensor,
    source: Tensor,
    tokens_per_expert: Tensor,
    offsets: Tensor,
    comm: int,
    grouped: bool,
    async_op: bool,
) -> tuple[Tensor, Tensor]:
    out_weights = (
        y.new_empty(0, dtype=torch.float32)
        if weight_grads is None
        else weight_grads.new_empty(topk_idx.shape)
    )
    return y.new_empty(topk_idx.shape[0], y.shape[1]), out_weights


# Gradients.


def dispatch_adjoint(
    routing: Sequence[Tensor],
    comm: int,
    grouped: bool,
    g_rows: Tensor,
    g_weights: Tensor | None,
    async_op: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and topk_weights: a combine along the same routes."""
    weight_grads = None if g_weights is None else g_weights.contiguous()
    gx, gw = torch.ops.commlib.combine(
        g_rows.contiguous(), None, None, weight_grads, *routing, comm, grouped, async_op
    )
    return gx, None if g_weights is None else gw


def combine_adjoint(
    routing: Sequence[Tensor],
    comm: int,
    grouped: bool,
    g_out: Tensor,
    g_out_weights: Tensor | None,
    async_op: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rows of the output's gradient, and gradients of weights that rode back: a dispatch on the routes."""
    weights = None if g_out_weights is None else g_out_weights.contiguous()
    rows, g_weight_grads = torch.ops.commlib.redispatch(
        g_out.contiguous(), weights, *routing, comm, grouped, False, async_op
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
    _, topk_idx, topk_weights, ctx.comm, ctx.grouped, *_ = inputs
    ctx.has_weights = topk_weights is not None
    ctx.save_for_backward(topk_idx, *output[2:])


def _dispatch_backward(ctx: Any, g_rows: Tensor, g_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    weights = g_weights if ctx.has_weights else None
    gx, gw = dispatch_adjoint(ctx.saved_tensors, ctx.comm, ctx.grouped, g_rows, weights)
    return gx, None, gw, *(None,) * 7


def _setup_redispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, topk_weights, *routing, ctx.comm, ctx.grouped, _, _ = inputs
    ctx.has_weights = topk_weights is not None
    ctx.save_for_backward(*routing)


def _redispatch_backward(ctx: Any, g_rows: Tensor, g_weights: Tensor) -> tuple[Any, ...]:
    weights = g_weights if ctx.has_weights else None
    gx, gw = dispatch_adjoint(ctx.saved_tensors, ctx.comm, ctx.grouped, g_rows, weights)
    return gx, gw, *(None,) * 10


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    y, weights, bias, weight_grads, *routing, ctx.comm, ctx.grouped, _ = inputs
    ctx.has_bias = bias is not None
    ctx.has_weight_grads = weight_grads is not None
    weighted = () if weights is None else (y, weights)
    ctx.save_for_backward(*routing, *weighted)


def _combine_backward(ctx: Any, g_out: Tensor, g_out_weights: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    routing, weighted = saved[: len(Routing._fields)], saved[len(Routing._fields) :]
    weights = g_out_weights if ctx.has_weight_grads else None
    rows, g_weight_grads = combine_adjoint(routing, ctx.comm, ctx.grouped, g_out, weights)
    gy, gw = gradients_of_rows(rows, *weighted)
    return (
        gy,
        gw,
        g_out if ctx.has_bias else None,
        g_weight_grads,
        *(None,) * 9,
    )


torch.library.register_autograd("commlib::dispatch", _dispatch_backward, setup_context=_setup_dispatch)
torch.library.register_autograd("commlib::redispatch", _redispatch_backward, setup_context=_setup_redispatch)
torch.library.register_autograd("commlib::combine", _combine_backward, setup_context=_setup_combine)

dispatch = torch.ops.commlib.dispatch.default
redispatch = torch.ops.commlib.redispatch.default
combine = torch.ops.commlib.combine.default


def combine_into(out: Tensor, arguments: tuple[Any, ...]) -> None:
    """combine, written into ``out``; not differentiable."""
    implementation: Callable[..., Any] = _combine
    implementation(*arguments, out=out)
