"""Handles of DeepEP's shape, which carry commlib's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from commlib.compat.deep_ep.errors import Refused
from commlib.compat.deep_ep.events import EventHandle, EventOverlap
from commlib.dispatched import Handle


@dataclass
class Route:
    """What later calls need from a dispatch."""

    handle: Handle
    rows: int  # of recv_x: those that came, and those that num_worst_tokens adds
    event: EventHandle | None = None  # of the dispatch

    def follows(self, event: EventOverlap) -> None:
        """Note the event after which an asynchronous dispatch is done."""
        if event.event is not None:
            self.event = event.event

    def ready(self) -> Handle:
        """The handle, once its dispatch is done: another communicator would not wait for it."""
        if self.event is not None:
            self.event.current_stream_wait()
            self.event = None
        return self.handle


class DispatchHandle(tuple):
    """V1's handle: ``(rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx,
    is_token_in_rank, send_head)``, in which there is one channel.

    * rank_prefix_matrix ``[R, R]`` int32: ``[i][j]`` rows that rank j gets from ranks 0 to i.
    * channel_prefix_matrix ``[R, 1]`` int32: tokens of this rank that go to each rank.
    * recv_channel_prefix_matrix ``[R, 1]`` int32: the first row of each source rank.
    * recv_src_idx ``[N]`` int32: each row's token at its source; -1 in rows that fill.
    * is_token_in_rank ``[T, R]`` bool.
    * send_head ``[T, R]`` int32: a token's number among those for a rank; -1 where it does not go.
    """

    _route: Route | None = None

    @staticmethod
    def of(tensors: tuple[Tensor, ...], route: Route) -> DispatchHandle:
        """The handle of a dispatch."""
        made = DispatchHandle(tensors)
        made._route = route
        return made


def send_heads(is_token_in_rank: Tensor) -> Tensor:
    """``[T, R]`` int32: a token's number among those that go to a rank; -1 where it does not go."""
    numbers = is_token_in_rank.cumsum(0, dtype=torch.int32) - 1
    return numbers.masked_fill_(~is_token_in_rank, -1)


@dataclass(eq=False)
class EPHandle:
    """V2's handle. All tensors are int32 and on the rows' device, unless stated.

    Attributes:
        do_expand: rows are grouped by local expert, one for each (token, expert).
        num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: of the dispatch.
        topk_idx: ``[T, K]`` int64; a copy with ``do_handle_copy``.
        num_recv_tokens: N, unique tokens received.
        num_expanded_tokens: rows of recv_x with do_expand, padding included; else N.
        num_recv_tokens_per_expert_list: by local expert, rounded up to the alignment.
        psum_num_recv_tokens_per_scaleup_rank: ``[R]``, unique tokens from ranks 0 to i.
        psum_num_recv_tokens_per_expert: ``[L]``. do_expand: the group's begin plus its tokens; else the sum
            of rounded counts of experts 0 to i.
        num_unaligned_recv_tokens_per_expert: ``[L]`` tokens of each expert; None without do_expand.
        recv_src_metadata: ``[N, 2 + K]``: the token's number over all ranks (rank * num_max_tokens_per_rank +
            token), source rank * K + its first place that is here, and for each place the row of recv_x
            (do_expand) or -1.
        dst_buffer_slot_idx: ``[T, K]``: the token's number at the rank that owns the place; -1: none does.
        token_metadata_at_forward, channel_linked_list: None.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_unaligned_recv_tokens_per_expert: Tensor | None
    recv_src_metadata: Tensor
    dst_buffer_slot_idx: Tensor
    token_metadata_at_forward: Tensor | None = None
    channel_linked_list: Tensor | None = None

    _route: Route | None = field(default=None, init=False, repr=False)
    _recv_topk_idx: Tensor | None = field(default=None, init=False, repr=False)


def route_of(handle: Any, kind: type[DispatchHandle] | type[EPHandle]) -> Route:
    """The route that a caller's handle carries.

    Raises:
        TypeError: it is not of that kind.
        Refused: no dispatch returned it.
    """
    if not isinstance(handle, kind):
        raise TypeError(
            f"handle must be the {kind.__name__} that dispatch returned, the object itself and not a copy, "
            f"got {type(handle).__name__}"
        )
    if handle._route is None:
        raise Refused("no dispatch has returned this handle")
    return handle._route
