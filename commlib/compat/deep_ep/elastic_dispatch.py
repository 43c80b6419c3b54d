"""What ``ElasticBuffer.dispatch`` does once its call is checked."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

from commlib.compat.deep_ep import elastic_handles as handles
from commlib.compat.deep_ep import layout as layouts
from commlib.compat.deep_ep.communicators import Communicators
from commlib.compat.deep_ep.errors import Refused, at_least, require
from commlib.compat.deep_ep.events import Work
from commlib.compat.deep_ep.handles import EPHandle, Route
from commlib.compat.deep_ep.rows import Parcel, Rows


class Arrived(NamedTuple):
    """What came."""

    x: Rows
    weights: Tensor | None
    counts: Tensor  # [L] of each local expert


def checked(
    given: dict[str, Any], known: int, ranks: int, topk_idx: Tensor | None, x: Tensor
) -> tuple[handles.Shape, Tensor]:
    """The shape of a dispatch without a handle, and its ids.

    Args:
        given: arguments by name, some of them None.
        known: num_max_tokens_per_rank of the buffer.
        ranks: how many.
        topk_idx: as given.
        x: the rows that are sent.

    Raises:
        TypeError, ValueError: arguments that are missing, or do not fit each other.
    """
    if topk_idx is None:
        raise Refused("without a handle, topk_idx is needed")
    require(given["num_experts"] is not None, "without a handle, num_experts is needed")
    most, alignment = given["num_max_tokens_per_rank"], given["expert_alignment"]
    shape = handles.Shape(
        at_least("num_experts", given["num_experts"], 1),
        at_least("num_max_tokens_per_rank", known if most is None else most, 1),
        at_least("expert_alignment", 1 if alignment is None else alignment, 1),
        bool(given["do_expand"]),
    )
    tokens = len(x)
    layouts.check_beside(x, topk_idx=topk_idx)
    layouts.local_experts(shape.num_experts, ranks)
    layouts.check_topk_idx(topk_idx, shape.num_experts)
    layouts.check_topk(topk_idx.shape[1], shape.num_experts)
    require(len(topk_idx) == tokens, f"topk_idx has {len(topk_idx)} tokens, but x has {tokens}")
    most = shape.num_max_tokens_per_rank
    require(tokens <= most, f"x has {tokens} tokens, but num_max_tokens_per_rank is {most}")
    return shape, topk_idx


def dispatch(
    runtime: Communicators,
    parcel: Parcel,
    weights: Tensor | None,
    work: Work,
    asynchronous: bool,
    shape: handles.Shape,
    ids: Tensor,
    most: int | None,
    num_sms: int,
    copy: bool,
) -> tuple[EPHandle, Arrived]:
    """Dispatch without a handle; ``most``: a rank's tokens, for the communicator, or None: it grows."""
    sent = parcel.sent
    ep = runtime.of(shape.num_experts, ids.shape[1], sent.shape[1], sent.dtype, sent.device, most)
    layout: Literal["rank", "expert"] = "expert" if shape.do_expand else "rank"
    align = shape.expert_alignment if shape.do_expand else 1
    d = ep.dispatch(sent, ids, weights, layout=layout, align=align, async_op=asynchronous)
    work.add(d.event)
    made = handles.made_of(d, shape, ids.clone() if copy else ids, num_sms, runtime.group.size, work)
    made._route = Route(d.handle, d.handle.num_rows)
    made._recv_topk_idx = d.topk_idx
    return made, Arrived(parcel.unpack(d.x, work, None), d.topk_weights, d.tokens_per_expert)


def dispatch_along(
    runtime: Communicators,
    parcel: Parcel,
    weights: Tensor | None,
    work: Work,
    asynchronous: bool,
    route: Route,
) -> Arrived:
    """Dispatch along the route of a handle."""
    sent = parcel.sent
    ep, known = runtime.along(route.ready(), sent.shape[1], sent.dtype)
    d = ep.dispatch(sent, None, weights, handle=known, async_op=asynchronous)
    work.add(d.event)
    return Arrived(parcel.unpack(d.x, work, None), d.topk_weights, d.tokens_per_expert)
