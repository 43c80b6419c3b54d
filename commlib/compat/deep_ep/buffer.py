"""Buffer: DeepEP's first interface."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from commlib.arguments import as_bool
from commlib.compat.deep_ep import layout as layouts
from commlib.compat.deep_ep import normal
from commlib.compat.deep_ep import rows as parcels
from commlib.compat.deep_ep.combining import biases_of, check_y, sum_rows
from commlib.compat.deep_ep.communicators import Communicators
from commlib.compat.deep_ep.config import Config
from commlib.compat.deep_ep.errors import Refused, at_least, not_yet, require
from commlib.compat.deep_ep.events import EventHandle, EventOverlap, Work, wait_for
from commlib.compat.deep_ep.groups import group_of
from commlib.compat.deep_ep.handles import DispatchHandle, route_of
from commlib.compat.deep_ep.layout import Layout
from commlib.compat.deep_ep.low_latency import LowLatency
from commlib.compat.deep_ep.owner import Owner
from commlib.compat.deep_ep.rows import Rows
from commlib.devices import cuda

_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # numbers for which DeepEP has tuned configs
Call = TypeVar("Call", bound=Callable[..., Any])


def outside_autograd(call: Call) -> Call:
    """DeepEP's calls are not differentiable: callers wrap them in functions that are."""

    @functools.wraps(call)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return call(*args, **kwargs)

    return inner  # type: ignore[return-value]


class Buffer(Owner, LowLatency):
    """Dispatch and combine with DeepEP's calls. Nothing is allocated before the first one.

    Args:
        group: torch.distributed ProcessGroup of any backend; also what :class:`commlib.ExpertParallel` takes.
        num_nvl_bytes, num_rdma_bytes: kept as attributes, otherwise ignored: commlib sizes itself.
        low_latency_mode: kept as an attribute, otherwise ignored: one buffer serves both modes.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl: ignored.
        explicitly_destroy: :meth:`destroy` may be called.
        enable_shrink: refused.
        comm: an mpi4py communicator, with ``group`` None.

    Attributes:
        rank, group_size: of the group.
        group: as given.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy, enable_shrink: as given.
        runtime: what holds the communicators; None once destroyed.

    Raises:
        ValueError: there is no group.
        NotImplementedError: enable_shrink.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if enable_shrink:
            not_yet("enable_shrink", "it leaves out no ranks; a rank that is gone is an error on all others")
        self.group, ranks = group_of(group, comm)
        self.rank, self.group_size = ranks.rank, ranks.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime = Communicators(ranks, lambda: Buffer.num_sms)

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether commlib can use a GPU of compute capability 9.0 or more here."""
        return cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set how many SMs communicators made from now on take on a GPU, for all buffers; no effect on the
        CPU.

        Raises:
            Refused: an odd number, or none.
        """
        require(
            new_num_sms > 0 and new_num_sms % 2 == 0,
            f"the SM count must be even and positive, got {new_num_sms}",
        )
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event after everything queued on the current stream so far."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A Config.

        Raises:
            Refused: DeepEP has none for this number of ranks.
        """
        require(num_ranks in _RANKS, f"Unsupported number of EP ranks: {num_ranks}; DeepEP knows {_RANKS}")
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """As :meth:`get_dispatch_config`."""
        return Buffer.get_dispatch_config(num_ranks)

    @outside_autograd
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """How many tokens go where.

        Args:
            topk_idx: ``[T, K]`` int64 global ids; -1 leaves a place empty. K at most 32.
            num_experts: over all ranks, a multiple of them.
            previous_event, async_finish, allocate_on_comm_stream: as in :meth:`dispatch`.

        Returns:
            num_tokens_per_rank ``[R]`` int32, None (the shape is always that of one node),
            num_tokens_per_expert ``[E]`` int32, is_token_in_rank ``[T, R]`` bool, event.
        """
        _check_allocation(previous_event, async_finish, allocate_on_comm_stream)
        wait_for(previous_event)
        layouts.local_experts(num_experts, self.group_size)
        layouts.check_topk_idx(topk_idx, num_experts)
        found = layouts.find_layout(topk_idx, num_experts, self.group_size)
        event = EventOverlap(EventHandle() if async_finish else None)
        return found.num_tokens_per_rank, None, found.num_tokens_per_expert, found.is_token_in_rank, event

    @outside_autograd
    def dispatch(
        self,
        x: Rows,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, tuple | None, EventOverlap]:
        """Send each token once to each of its ranks.

        Args:
            x: ``[T, H]`` of a dtype whose row is a multiple of 16 bytes, or (``[T, H]`` float8_e4m3fn,
                ``[T, S]`` float32 or int32 scales).
            handle: of an earlier dispatch: send along its routes. Then no layout and no top-k.
            num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: of :meth:`get_dispatch_layout`.
            num_tokens_per_rdma_rank: ignored.
            topk_idx, topk_weights: ``[T, K]`` int64 and float32, both or neither.
            expert_alignment: the counts returned are rounded up to multiples of it.
            num_worst_tokens: number of rows returned, filled with zeros and -1; the list is empty. Needs
                top-k.
            config: ignored.
            previous_event: wait for it first.
            async_finish: return once the sizes are known; the event says when the results may be used.
            allocate_on_comm_stream: has no effect; needs previous_event and async_finish.

        Returns:
            recv_x (as x), recv_topk_idx ``[N, K]`` int64 local ids or -1, recv_topk_weights ``[N, K]``
            float32, 0 where -1, tokens of each local expert, handle, event. Rows are ordered by source rank,
            then token. Along a handle: recv_x, None, None, None, None, event.

        Raises:
            Refused: arguments that DeepEP asserts against. It is an AssertionError and a ValueError.
            ValueError, TypeError: arguments that commlib cannot send. Nothing has been sent then.
            commlib.CapacityExceeded: more than num_worst_tokens rows came, on this rank.
            commlib.PeerTimeout: a rank did not come.
        """
        _check_allocation(previous_event, async_finish, allocate_on_comm_stream)
        _check_config(config)
        runtime = self._runtime()
        wait_for(previous_event)
        parcel = parcels.pack(x)
        if handle is not None:
            without = topk_idx is None and topk_weights is None
            require(without, "with a handle, topk_idx and topk_weights must be None")
            route = route_of(handle, DispatchHandle)
            return normal.dispatch_along(runtime, route, parcel, async_finish)
        given = (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank)
        if any(one is None for one in given):
            raise Refused(
                "without a handle, num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert are needed"
            )
        layout = Layout(*given)  # type: ignore[arg-type]
        sizes = (
            at_least("expert_alignment", expert_alignment, 1),
            at_least("num_worst_tokens", num_worst_tokens, 0),
        )
        routed = normal.routed(self.group_size, layout, topk_idx, topk_weights, parcel.sent)
        with_top_k = topk_idx is not None
        require(not num_worst_tokens or with_top_k, "num_worst_tokens needs topk_idx and topk_weights")
        return normal.dispatch(runtime, parcel, layout, routed, topk_weights, sizes, async_finish)

    @outside_autograd
    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sum each token's rows over the ranks that it went to, without weights.

        Args:
            x: ``[N, H]`` bfloat16, in the order of the dispatch; on the CPU also float16 and float32. H may
                differ from the dispatch's.
            handle: of the dispatch.
            topk_weights: ``[N, K]`` float32, all places of which are summed over ranks like the rows.
            bias: ``[T, H]``, or two of them; where one rank gives two, all must.
            config: ignored.
            previous_event, async_finish, allocate_on_comm_stream: as in :meth:`dispatch`.

        Returns:
            ``[T, H]``, summed in float32 and rounded once; ``[T, K]`` float32 or None; event. A token that
            went nowhere gets the biases.

        Raises:
            Refused, ValueError, TypeError, PeerTimeout: as dispatch.
        """
        _check_allocation(previous_event, async_finish, allocate_on_comm_stream)
        _check_config(config)
        runtime = self._runtime()
        wait_for(previous_event)
        route = route_of(handle, DispatchHandle)
        check_y(x, route)
        biases = biases_of(bias, x, route.handle.num_tokens)
        if topk_weights is not None:
            layouts.check_beside(x, topk_weights=topk_weights)
            layouts.check_weights("topk_weights", topk_weights, (route.rows, None))
        routing = route.ready()
        came = routing.num_rows
        work = Work(x.device, lambda: runtime.stream(x.device))
        combined, _ = sum_rows(runtime, routing, x[:came], biases, work, async_finish)
        weights = None
        if topk_weights is not None:
            weights, _ = sum_rows(runtime, routing, topk_weights[:came], (), work, async_finish)
        return combined, weights, work.end(async_finish)

    def internode_dispatch(
        self,
        x: Rows,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, tuple | None, EventOverlap]:
        """:meth:`dispatch`, which goes between nodes by itself; config must be given, as in DeepEP."""
        require(config is not None, "internode_dispatch needs a config")
        layout = (num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert)
        rest = (config, previous_event, async_finish, allocate_on_comm_stream)
        return self.dispatch(x, handle, *layout, topk_idx, topk_weights, expert_alignment, 0, *rest)

    def internode_combine(
        self,
        x: Tensor,
        handle: tuple | list,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """:meth:`combine`, which goes between nodes by itself; config must be given, as in DeepEP."""
        require(config is not None, "internode_combine needs a config")
        rest = (config, previous_event, async_finish, allocate_on_comm_stream)
        return self.combine(x, handle, topk_weights, bias, *rest)  # type: ignore[arg-type]


def _check_allocation(previous_event: Any, async_finish: Any, allocate_on_comm_stream: bool) -> None:
    as_bool("async_finish", async_finish)
    require(
        not allocate_on_comm_stream or (previous_event is not None and async_finish),
        "allocate_on_comm_stream needs previous_event and async_finish",
    )


def _check_config(config: Any) -> None:
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config must be a Config of this module, got {type(config).__name__}")
