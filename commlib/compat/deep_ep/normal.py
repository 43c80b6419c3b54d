"""Normal mode: what ``Buffer.dispatch`` does once its call is checked."""

from __future__ import annotations

import torch
from torch import Tensor

from commlib.compat.deep_ep import layout as layouts
from commlib.compat.deep_ep import rows as parcels
from commlib.compat.deep_ep.communicators import Communicators
from commlib.compat.deep_ep.errors import require
from commlib.compat.deep_ep.events import EventOverlap, Work
from commlib.compat.deep_ep.handles import DispatchHandle, Route, send_heads
from commlib.compat.deep_ep.layout import Layout
from commlib.compat.deep_ep.rows import Rows
from commlib.errors import CapacityExceeded


def routed(
    ranks: int, layout: Layout, topk_idx: Tensor | None, topk_weights: Tensor | None, x: Tensor
) -> tuple[int, Tensor]:
    """The ids that route the tokens, the caller's or ranks, and before them how many experts these are of.

    Raises:
        TypeError, ValueError: see :mod:`commlib.compat.deep_ep.layout`.
    """
    experts = layouts.check_layout(layout, x, ranks)
    require(
        (topk_idx is None) == (topk_weights is None),
        "topk_idx and topk_weights are needed both, or neither",
    )
    if topk_idx is None:
        return ranks, layouts.ranks_as_ids(layout.is_token_in_rank)
    layouts.check_beside(x, topk_idx=topk_idx, topk_weights=topk_weights)
    layouts.check_topk_idx(topk_idx, experts)
    layouts.check_topk(topk_idx.shape[1], experts)
    require(len(topk_idx) == len(x), f"topk_idx has {len(topk_idx)} tokens, but x has {len(x)}")
    layouts.check_weights("topk_weights", topk_weights, tuple(topk_idx.shape))
    layouts.check_agreement(layout, topk_idx)
    return experts, topk_idx


def dispatch(
    runtime: Communicators,
    parcel: parcels.Parcel,
    layout: Layout,
    routed: tuple[int, Tensor],
    weights: Tensor | None,
    sizes: tuple[int, int],
    async_finish: bool,
) -> tuple[Rows, Tensor | None, Tensor | None, list[int], tuple, EventOverlap]:
    """``Buffer.dispatch`` without a handle.

    Args:
        runtime: the buffer's communicators.
        parcel: the rows.
        layout: the caller's.
        routed: see :func:`routed`.
        weights: topk_weights; None: the mask routes.
        sizes: expert_alignment and num_worst_tokens.
        async_finish: return once the sizes are known.
    """
    sent, (alignment, worst) = parcel.sent, sizes
    rank, ranks = runtime.group.rank, runtime.group.size
    work = Work(sent.device, lambda: runtime.stream(sent.device))
    counts = torch.cat([layout.num_tokens_per_rank, layout.num_tokens_per_expert])
    shared, told = runtime.share(counts)
    work.add(told)
    experts, ids = routed
    ep = runtime.of(experts, ids.shape[1], sent.shape[1], sent.dtype, sent.device)
    d = ep.dispatch(sent, ids, weights, async_op=async_finish)
    work.add(d.event)
    came = d.handle.num_rows
    if worst and came > worst:
        text = f"rank {rank} received {came} rows, but num_worst_tokens is {worst}"
        raise CapacityExceeded(text, rank, came)
    rows = worst or came
    tensors = _handle_tensors(rank, layout, shared, d.source, rows, work)
    route = Route(d.handle, rows)
    recv_x = parcel.unpack(d.x, work, rows)
    recv_idx = recv_weights = None
    if weights is None:
        told.wait()
        each = shared[:, ranks:].sum(0).view(ranks, -1)[rank].tolist()
    else:
        recv_idx = work.settled(d.topk_idx, rows, fill=-1)
        recv_weights = work.settled(d.topk_weights, rows)
        each = [] if worst else d.handle.counts()
    event = work.end(async_finish)
    route.follows(event)
    handle = DispatchHandle.of(tensors, route)
    return recv_x, recv_idx, recv_weights, layouts.rounded_up(each, alignment), handle, event


def _handle_tensors(
    rank: int, layout: Layout, shared: Tensor, source: Tensor, rows: int, work: Work
) -> tuple[Tensor, ...]:
    """See :class:`DispatchHandle`. ``shared``: ``[R, R + E]``, each rank's counts by rank and expert."""
    ranks, here = len(layout.num_tokens_per_rank), shared.device
    prefix = torch.empty(ranks, ranks, dtype=torch.int32, device=here)
    begins = torch.empty(ranks, 1, dtype=torch.int32, device=here)

    def add_up() -> None:
        counts = shared[:, :ranks]
        torch.cumsum(counts, 0, dtype=torch.int32, out=prefix)
        begins.copy_((prefix[:, rank] - counts[:, rank]).view(-1, 1))

    work.then(add_up, prefix, begins, shared)
    mask = layout.is_token_in_rank
    sent = layout.num_tokens_per_rank.view(-1, 1).clone()
    src = work.settled(source[:, 1], rows, fill=-1, dtype=torch.int32)
    return prefix, sent, begins, src, mask, send_heads(mask)


def dispatch_along(
    runtime: Communicators, route: Route, parcel: parcels.Parcel, async_finish: bool
) -> tuple[Rows, None, None, None, None, EventOverlap]:
    """``Buffer.dispatch`` with a handle."""
    sent, tokens = parcel.sent, route.handle.num_tokens
    require(len(sent) == tokens, f"x has {len(sent)} tokens, but the handle's dispatch had {tokens}")
    ep, handle = runtime.along(route.ready(), sent.shape[1], sent.dtype)
    work = Work(sent.device, lambda: runtime.stream(sent.device))
    d = ep.dispatch(sent, handle=handle, async_op=async_finish)
    work.add(d.event)
    recv_x = parcel.unpack(d.x, work, route.rows)
    return recv_x, None, None, None, None, work.end(async_finish)
