"""The contents of an EPHandle, from what a dispatch found."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib._core import Placement
from commlib.compat.deep_ep.errors import require
from commlib.compat.deep_ep.events import Work
from commlib.compat.deep_ep.handles import EPHandle, route_of
from commlib.compat.deep_ep.layout import check_beside, rounded_up
from commlib.dispatched import Dispatched


class Shape(NamedTuple):
    """What a dispatch and its handle agree on."""

    num_experts: int
    num_max_tokens_per_rank: int
    expert_alignment: int
    do_expand: bool


def checked_shape(handle: Any, given: dict[str, Any], tokens: int) -> Shape:
    """The handle's shape, which a call along it may repeat.

    Raises:
        TypeError, Refused: it is no handle, or the call differs from it.
    """
    route = route_of(handle, EPHandle)
    shape = Shape(*(getattr(handle, name) for name in Shape._fields))
    for name, value in given.items():
        known = getattr(shape, name)
        require(value is None or value == known, f"{name} is {value}, but the handle's dispatch had {known}")
    sent = route.handle.num_tokens
    require(tokens == sent, f"x has {tokens} tokens, but the handle's dispatch had {sent}")
    return shape


def check_stats(stats: Any, experts: int, x: Tensor) -> None:
    """Check counts to add to.

    Raises:
        TypeError, Refused: they are not ``[L]`` int32, on the device of the rows.
    """
    if stats is None:
        return
    name = "cumulative_local_expert_recv_stats"
    check_beside(x, **{name: stats})
    require(
        stats.shape == (experts,) and stats.dtype == torch.int32,
        f"{name} must be [{experts}] int32, got {list(stats.shape)} {stats.dtype}",
    )


def add_stats(stats: Tensor, counts: Tensor, work: Work) -> None:
    """Add the tokens of each local expert, when the dispatch is done."""
    work.then(lambda: stats.add_(counts), stats, counts)


def made_of(
    d: Dispatched[Tensor], shape: Shape, topk_idx: Tensor, num_sms: int, ranks: int, work: Work
) -> EPHandle:
    """The handle of a dispatch, complete when the dispatch is."""
    routing = d.handle._plan
    counts = d.tokens_per_expert
    listed = rounded_up(d.handle.counts(), shape.expert_alignment)
    unique = len(routing.local)
    topk = topk_idx.shape[1]

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=counts.device)

    by_rank, by_expert, metadata, places = (
        new(ranks),
        new(len(counts)),
        new(unique, 2 + topk),
        new(*topk_idx.shape),
    )
    exact = new(len(counts)) if shape.do_expand else None

    def fill() -> None:
        _fill(d, routing.local, shape, topk, by_rank, metadata)
        by_expert.copy_(_sums(counts, d.offsets, listed))
        places.copy_(_places(routing.routes, topk_idx, shape.num_experts, ranks))
        if exact is not None:
            exact.copy_(counts)

    read = (d.source, counts, *routing.tensors, *(() if d.offsets is None else (d.offsets,)))
    work.then(fill, by_rank, by_expert, metadata, places, *(() if exact is None else (exact,)), *read)
    return EPHandle(
        do_expand=shape.do_expand,
        num_experts=shape.num_experts,
        expert_alignment=shape.expert_alignment,
        num_max_tokens_per_rank=shape.num_max_tokens_per_rank,
        num_sms=num_sms,
        topk_idx=topk_idx,
        num_recv_tokens=unique,
        num_expanded_tokens=d.handle.num_rows,
        num_recv_tokens_per_expert_list=listed,
        psum_num_recv_tokens_per_scaleup_rank=by_rank,
        psum_num_recv_tokens_per_expert=by_expert,
        num_unaligned_recv_tokens_per_expert=exact,
        recv_src_metadata=metadata,
        dst_buffer_slot_idx=places,
    )


def _fill(
    d: Dispatched[Tensor], local: Tensor, shape: Shape, topk: int, by_rank: Tensor, metadata: Tensor
) -> None:
    """Fill fields for each unique token that came: see EPHandle. ``local``: its experts; do_expand: rows."""
    here = local >= 0
    first = here.to(torch.int32).argmax(1)
    source = d.source
    if shape.do_expand:
        source = source[local.gather(1, first.view(-1, 1)).flatten()] if len(local) else source[:0]
        metadata[:, 2:] = local
    else:
        metadata[:, 2:] = -1
    rank, token = source.unbind(1)
    metadata[:, 0] = rank * shape.num_max_tokens_per_rank + token
    metadata[:, 1] = rank * topk + first
    counts = torch.zeros(len(by_rank), dtype=torch.int32, device=rank.device)
    counts.scatter_add_(0, rank, torch.ones_like(rank, dtype=torch.int32))
    by_rank.copy_(counts.cumsum(0))


def _sums(counts: Tensor, offsets: Tensor | None, listed: list[int]) -> Tensor:
    if offsets is not None:
        return offsets[:-1] + counts
    return torch.tensor(listed, device=counts.device).cumsum(0)


@cache
def _owners(num_experts: int, ranks: int, device: torch.device) -> Tensor:
    return torch.tensor(Placement(num_experts, ranks).owners, device=device)


def _places(routes: Tensor, topk_idx: Tensor, num_experts: int, ranks: int) -> Tensor:
    """``[T, K]``: a token's number at the rank that owns the place."""
    owners = _owners(num_experts, ranks, topk_idx.device)
    owner = torch.where(topk_idx >= 0, owners[topk_idx.clamp(min=0)], -1)
    to = torch.where(routes >= 0, routes >> 32, -2)
    number = (routes & 0xFFFFFFFF).unsqueeze(1)  # [T, 1, width]
    found = owner.unsqueeze(2) == to.unsqueeze(1)  # [T, K, width]
    return torch.where(found, number, -1).amax(2)
