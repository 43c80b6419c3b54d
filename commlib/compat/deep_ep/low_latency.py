"""Low latency mode: a room of fixed size for each expert, and no host that waits for counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from commlib.arguments import as_bool
from commlib.compat.deep_ep import layout as layouts
from commlib.compat.deep_ep.communicators import Communicators
from commlib.compat.deep_ep.errors import Refused, at_least, not_yet, require
from commlib.compat.deep_ep.events import EventHandle, EventOverlap, Work
from commlib.compat.deep_ep.rows import dense_rows
from commlib.dispatched import Dispatched, Handle
from commlib.expert_parallel import ExpertParallel
from commlib.quantization import QuantFormat

_MASKS = "it leaves out no ranks: a rank that is gone is an error (commlib.PeerTimeout) on all others"
_HEADER = 16  # bytes beside a row
_NARROW = 4  # elements of a row that goes with weights
_PACKED = 4  # scales in an int32

Rows = Tensor | tuple[Tensor, Tensor]
Hook = Callable[[], None]


class LowLatencyHandle(tuple):
    """``(src_info, layout_range, num_max_dispatch_tokens_per_rank, hidden, num_experts)``.

    * src_info ``[L, R * M]`` int32: each row's token at its source; -1 where there is no row.
    * layout_range ``[L, R]`` int64: for each source rank its first row << 32, and how many there are.
    """

    _route: _Route | None = None


class _Route:
    """What combine needs from a dispatch."""

    def __init__(self, ep: ExpertParallel, handle: Handle, tokens: int, shape: tuple[int, ...]) -> None:
        self.ep, self.handle, self.tokens, self.shape = ep, handle, tokens, shape
        self.hook: _Once | None = None  # that has to be called before
        self.event: EventHandle | None = None  # likewise to be waited for
        self.buffer: Tensor | None = None  # lent last


class _Once:
    """A receive hook: what is left of an operation, for the caller's stream."""

    def __init__(self, name: str, rest: EventHandle) -> None:
        self._name, self._rest = name, rest
        self.called = False

    def __call__(self) -> None:
        if self.called:
            raise Refused(f"this hook of {self._name} has been called before: its results are there")
        self._rest.current_stream_wait()
        self.called = True


class _Options(NamedTuple):
    async_finish: bool
    return_recv_hook: bool

    @staticmethod
    def of(async_finish: Any, return_recv_hook: Any) -> _Options:
        options = _Options(
            as_bool("async_finish", async_finish), as_bool("return_recv_hook", return_recv_hook)
        )
        require(not all(options), "async_finish and return_recv_hook exclude each other")
        return options

    @property
    def later(self) -> bool:
        """Whether results may be used only after an event or a hook."""
        return self.async_finish or self.return_recv_hook

    def end(self, name: str, work: Work) -> tuple[EventOverlap, _Once | None]:
        """The call's event and hook."""
        if self.return_recv_hook:
            return EventOverlap(), _Once(name, work.rest())
        return work.end(self.async_finish), None


class LowLatency:
    """The low latency methods of ``Buffer``."""

    group_size: int
    runtime: Communicators | None
    _runtime: Callable[[], Communicators]

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of two buffers of all ranks' bfloat16 rows for each local expert. commlib sizes itself."""
        rows = num_max_dispatch_tokens_per_rank * num_experts
        return 2 * rows * (2 * hidden + _HEADER)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing: normal mode leaves nothing behind."""
        at_least("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1)
        at_least("hidden", hidden, 1)
        layouts.local_experts(num_experts, self.group_size)

    @torch.no_grad()
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, Tensor, tuple, EventOverlap, Hook | None]:
        """Send each token to the ranks of its experts, which each have room for all rows that may come.

        Args:
            x: ``[T, H]`` bfloat16, T at most M.
            topk_idx: ``[T, K]`` int64 global ids; -1 leaves a place empty. K at most 32.
            num_max_dispatch_tokens_per_rank: M, the same on all ranks.
            num_experts: E, a multiple of the ranks.
            cumulative_local_expert_recv_stats: ``[L]`` int32, to which counts are added.
            dispatch_wait_recv_cost_stats: refused.
            use_fp8: rows travel as float8_e4m3fn with a scale for 128 elements; H a multiple of 128.
            round_scale: scales are powers of two.
            use_ue8m0: they come as exponents, four in an int32; needs round_scale, and H a multiple of 512.
            async_finish: results may be used after the event.
            return_recv_hook: after the hook, which is to be called once, on the stream that uses them.

        Returns:
            recv_x ``[L, R * M, H]``, with fp8 a pair with scales ``[L, R * M, H / 128]`` float32 (or / 512,
            int32), whose stride along rows is 1; recv_count ``[L]`` int32, so many rows of each expert are
            there, by source rank and token; handle; event; hook or None.

        Raises:
            Refused: arguments that DeepEP asserts against. It is an AssertionError and a ValueError.
            ValueError, TypeError: arguments that commlib cannot send. Nothing has been sent then.
            NotImplementedError: dispatch_wait_recv_cost_stats.
        """
        options = _Options.of(async_finish, return_recv_hook)
        if dispatch_wait_recv_cost_stats is not None:
            not_yet("dispatch_wait_recv_cost_stats", "commlib.timeline.Timeline shows what ranks wait for")
        most = at_least("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1)
        experts = layouts.local_experts(num_experts, self.group_size)
        _check_x(x, most)
        layouts.check_beside(x, topk_idx=topk_idx)
        layouts.check_topk_idx(topk_idx, num_experts)
        layouts.check_topk(topk_idx.shape[1], num_experts)
        require(len(topk_idx) == len(x), f"topk_idx has {len(topk_idx)} tokens, but x has {len(x)}")
        stats = cumulative_local_expert_recv_stats
        _check_given("cumulative_local_expert_recv_stats", stats, x, (experts,), torch.int32)
        quantize = _format(x.shape[1], use_fp8, round_scale, use_ue8m0)
        runtime = self._runtime()
        ep = runtime.of(num_experts, topk_idx.shape[1], x.shape[1], x.dtype, x.device, most)
        d = ep.dispatch(
            dense_rows(x),
            topk_idx,
            layout="batched",
            bounded=True,
            quantize=quantize,
            async_op=options.later,
        )
        work = Work(x.device, lambda: runtime.stream(x.device))
        work.add(d.event)
        counts = _counts(d, stats, work)
        scales = None if d.scales is None else _scales(d.scales, use_ue8m0, work)
        route = _Route(ep, d.handle, len(x), tuple(d.x.shape))
        handle = LowLatencyHandle((*_sources(d, self.group_size, work), most, x.shape[1], num_experts))
        handle._route = route
        event, hook = options.end("low_latency_dispatch", work)
        route.hook, route.event = hook, event.event
        return d.x if scales is None else (d.x, scales), counts, handle, event, hook

    @torch.no_grad()
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Sum each token's rows, each times its weight, at the token's rank.

        Args:
            x: ``[L, R * M, H]`` bfloat16, as recv_x of the handle's dispatch.
            topk_idx: as dispatched; only its shape is looked at.
            topk_weights: ``[T, K]`` float32.
            handle: of low_latency_dispatch, whose hook or event has been waited for.
            use_logfmt: refused.
            zero_copy: x is what get_next_low_latency_combine_buffer returned last, and is not copied.
            async_finish, return_recv_hook: as in low_latency_dispatch.
            out: ``[T, H]`` bfloat16 for the sums.
            combine_wait_recv_cost_stats: refused.

        Returns:
            ``[T, H]``, event, hook or None. A rank's own experts are summed in float32 and rounded before
            ranks are, so the last bit may differ from DeepEP's; it is the same every time.

        Raises:
            Refused: arguments that DeepEP asserts against, or a dispatch whose hook has not been called.
            TypeError: things of another kind.
            NotImplementedError: use_logfmt, combine_wait_recv_cost_stats.
        """
        options = _Options.of(async_finish, return_recv_hook)
        if as_bool("use_logfmt", use_logfmt):
            not_yet("use_logfmt", "rows come back in bfloat16")
        if combine_wait_recv_cost_stats is not None:
            not_yet("combine_wait_recv_cost_stats", "commlib.timeline.Timeline shows what ranks wait for")
        route = _route_of(handle)
        ep = route.ep
        places = (route.tokens, ep.settings.topk)
        _check_y(x, route)
        layouts.check_beside(x, topk_idx=topk_idx)
        require(
            tuple(topk_idx.shape) == places,
            f"topk_idx must be [{places[0]}, {places[1]}], as dispatched, got {list(topk_idx.shape)}",
        )
        layouts.check_beside(x, topk_weights=topk_weights)
        layouts.check_weights("topk_weights", topk_weights, places)
        _check_given("out", out, x, (route.tokens, x.shape[-1]), x.dtype, dense=True)
        if zero_copy:
            lent = route.buffer
            require(
                lent is not None and x.data_ptr() == lent.data_ptr(),
                "with zero_copy, x must be what get_next_low_latency_combine_buffer(handle) returned last",
            )
        runtime = self._runtime()
        work = Work(x.device, lambda: runtime.stream(x.device))
        weights = _weights_at_experts(runtime, route.handle, topk_weights)
        summed: Any = ep.combine(x, route.handle, weights=weights, out=out, async_op=options.later)
        route.buffer = None
        if options.later:
            summed, operation = summed
            work.add(operation)
        event, hook = options.end("low_latency_combine", work)
        return summed, event, hook

    def get_next_low_latency_combine_buffer(self, handle: tuple) -> Tensor:
        """``[L, R * M, H]`` bfloat16 for the x of one low_latency_combine with ``zero_copy``.

        Where a slot has no room for it, it is other memory, which combine copies.

        Raises:
            TypeError, Refused: no handle of low_latency_dispatch.
            commlib.HandleError: no slot is free.
        """
        route = _route_of(handle)
        comm = route.ep._comm
        if comm.can_group_in_slot(route.shape[0] * route.shape[1]):
            route.buffer = route.ep.combine_buffer(route.handle)
        else:
            route.buffer = comm.backend.new_rows(
                route.shape[0] * route.shape[1], route.shape[2], torch.bfloat16
            ).view(route.shape)
        return route.buffer

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> NoReturn:
        not_yet("masks of ranks (low_latency_update_mask_buffer)", _MASKS)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> NoReturn:
        not_yet("masks of ranks (low_latency_query_mask_buffer)", _MASKS)

    def low_latency_clean_mask_buffer(self) -> NoReturn:
        not_yet("masks of ranks (low_latency_clean_mask_buffer)", _MASKS)

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> NoReturn:
        not_yet(
            "raw buffer (get_local_buffer_tensor)",
            "commlib's memory is made when it is needed, and has a layout of its own",
        )


# -- what goes in --------------------------------------------------------------------------------------------


def _check_x(x: Any, most: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    require(x.dim() == 2, f"x must be [tokens, hidden], got {list(x.shape)}")
    require(x.dtype == torch.bfloat16, f"x must be bfloat16, got {x.dtype}")
    require(x.shape[1] > 0 and x.shape[1] % 8 == 0, f"hidden must be a multiple of 8, got {x.shape[1]}")
    require(
        len(x) <= most, f"x has {len(x)} tokens, and num_max_dispatch_tokens_per_rank is {most}: raise that"
    )


def _check_y(x: Any, route: _Route) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    settings = route.ep.settings
    require(
        tuple(x.shape) == route.shape and x.dtype == settings.dtype and x.device == settings.device,
        f"x must be {list(route.shape)} bfloat16 on {settings.device}, as recv_x of the handle's dispatch, "
        f"got {list(x.shape)} {x.dtype} on {x.device}",
    )


def _check_given(
    name: str, given: Any, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, dense: bool = False
) -> None:
    """That an optional tensor, where it is given, is what the call will write to."""
    if given is None:
        return
    layouts.check_beside(x, **{name: given})
    require(
        tuple(given.shape) == shape and given.dtype == dtype and (given.is_contiguous() or not dense),
        f"{name} must be {list(shape)} {str(dtype).removeprefix('torch.')}"
        f"{', one row after the other' if dense else ''}, got {list(given.shape)} {given.dtype}",
    )


def _format(hidden: int, use_fp8: Any, round_scale: Any, use_ue8m0: Any) -> QuantFormat | None:
    """What rows are converted to."""
    rounded, packed = as_bool("round_scale", round_scale), as_bool("use_ue8m0", use_ue8m0)
    require(rounded or not packed, "use_ue8m0 needs round_scale")
    if not as_bool("use_fp8", use_fp8):
        return None
    unit = 128 * _PACKED if packed else 128
    require(hidden % unit == 0, f"hidden must be a multiple of {unit} for these scales, got {hidden}")
    return "fp8_e4m3_ue8m0" if rounded else "fp8_e4m3"


def _route_of(handle: Any) -> _Route:
    """What a caller's handle carries, of a dispatch whose results are there."""
    if not isinstance(handle, LowLatencyHandle):
        raise TypeError(
            "handle must be the one that low_latency_dispatch returned, the object itself and not a copy, "
            f"got {type(handle).__name__}"
        )
    route = handle._route
    if route is None:
        raise Refused("no low_latency_dispatch has returned this handle")
    require(
        route.hook is None or route.hook.called,
        "call the hook of low_latency_dispatch before combine: the rows are not there yet",
    )
    if route.event is not None:
        route.event.current_stream_wait()
    return route


def _weights_at_experts(runtime: Communicators, handle: Handle, weights: Tensor) -> Tensor:
    """Of each row that an expert has: experts are the ones that multiply, in combine."""
    ep, known = runtime.along(handle, _NARROW, torch.float32)
    rows = torch.zeros(len(weights), _NARROW, device=weights.device)
    there = ep.dispatch(rows, None, dense_rows(weights), handle=known).topk_weights
    assert there is not None
    return there


# -- what comes out ------------------------------------------------------------------------------------------


def _counts(d: Dispatched, stats: Tensor | None, work: Work) -> Tensor:
    counts = torch.empty_like(d.tokens_per_expert, dtype=torch.int32)

    def count() -> None:
        counts.copy_(d.tokens_per_expert)
        if stats is not None:
            stats.add_(counts)

    work.then(count, counts, d.tokens_per_expert, *(() if stats is None else (stats,)))
    return counts


def _scales(came: Tensor, packed: bool, work: Work) -> Tensor:
    """``[L, R * M, S]`` with stride 1 along rows."""
    given = came.view(torch.int32) if packed else came
    experts, rows, each = given.shape
    dtype = torch.int32 if packed else torch.float32
    out = torch.empty(experts, each, rows, dtype=dtype, device=came.device).transpose(1, 2)
    work.then(lambda: out.copy_(given), out, came)
    return out


def _sources(d: Dispatched, ranks: int, work: Work) -> tuple[Tensor, Tensor]:
    """See :class:`LowLatencyHandle`."""
    source = d.source
    tokens = torch.empty(source.shape[:2], dtype=torch.int32, device=source.device)
    ranges = torch.empty(len(source), ranks, dtype=torch.int64, device=source.device)

    def find() -> None:
        tokens.copy_(source[..., 1])
        all_ranks = torch.arange(ranks, device=source.device)
        counts = (source[..., 0].unsqueeze(-1) == all_ranks).sum(1)
        ranges.copy_((counts.cumsum(1) - counts) << 32 | counts)

    work.then(find, tokens, ranges, source)
    return tokens, ranges
