"""ElasticBuffer: DeepEP's second interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from commlib.compat.deep_ep import elastic_dispatch as sending
from commlib.compat.deep_ep import elastic_handles as handles
from commlib.compat.deep_ep import layout as layouts
from commlib.compat.deep_ep import rows as parcels
from commlib.compat.deep_ep.buffer import Buffer, outside_autograd
from commlib.compat.deep_ep.combining import biases_of, check_y, sum_rows
from commlib.compat.deep_ep.communicators import Communicators
from commlib.compat.deep_ep.errors import at_least, not_yet, require
from commlib.compat.deep_ep.events import EventHandle, EventOverlap, Work, wait_for
from commlib.compat.deep_ep.experimental import Experimental
from commlib.compat.deep_ep.groups import group_of
from commlib.compat.deep_ep.handles import EPHandle, route_of
from commlib.compat.deep_ep.owner import Owner
from commlib.compat.deep_ep.rows import Rows

_UNIT = 2 << 20  # bytes: DeepEP's buffers are a multiple of this
_BYTES_BESIDE_A_ROW = 16
_QPS = {True: 129, False: 17}  # how many DeepEP allocates, by allow_hybrid_mode
_LEAST_SMS = 4


class ElasticBuffer(Owner, Experimental):
    """Dispatch and combine with the calls of DeepEP's second interface.

    Args:
        group: as for :class:`Buffer`.
        num_bytes: kept as an attribute; None: what :meth:`get_buffer_size_hint` says. commlib sizes itself.
        num_cpu_bytes: must be 0.
        num_max_tokens_per_rank: the most tokens that one rank sends in one call, unless that gives its own;
            the same on all ranks.
        hidden, num_topk, use_fp8_dispatch: for num_bytes only; rows of any size and kind are sent.
        deterministic: has no effect: results always are.
        allow_hybrid_mode: sets num_allocated_qps only.
        allow_multiple_reduction: False: with do_expand, rows travel as float32 in combine, and are rounded
            once.
        prefer_overlap_with_compute: False: get_theoretical_num_sms returns more.
        sl_idx: ignored.
        num_allocated_qps: kept as an attribute. 0: DeepEP's own number.
        num_cpu_timeout_secs, num_gpu_timeout_secs: the larger one is how long a rank waits for a peer.
        explicitly_destroy: :meth:`destroy` may be called.

    Attributes:
        group, num_bytes, num_max_tokens_per_rank, deterministic, allow_hybrid_mode: as given.
        allow_multiple_reduction, prefer_overlap_with_compute: as given.
        num_allocated_qps, explicitly_destroy: as given.
        rank_idx, num_ranks: of the group.
        num_scaleout_ranks, scaleout_rank_idx, num_rdma_ranks: 1, 0, 1.
        num_scaleup_ranks, scaleup_rank_idx, num_nvlink_ranks: all ranks, as one domain.
        runtime: what holds the communicators; None once destroyed.

    Raises:
        ValueError: there is no group.
        Refused: a negative number.
        NotImplementedError: num_cpu_bytes.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if num_cpu_bytes:
            not_yet(
                "num_cpu_bytes", "its rows lie where the tensors given to a call lie, on the CPU or a GPU"
            )
        self.num_max_tokens_per_rank = at_least("num_max_tokens_per_rank", num_max_tokens_per_rank, 0)
        self.group, ranks = group_of(group)
        self.rank_idx, self.num_ranks = ranks.rank, ranks.size
        if num_bytes is None:
            num_bytes = _buffer_bytes(ranks.size, num_max_tokens_per_rank, hidden, num_topk)
        self.num_bytes = num_bytes
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.num_allocated_qps = num_allocated_qps or _QPS[bool(allow_hybrid_mode)]
        self.explicitly_destroy = explicitly_destroy
        timeout = float(max(num_cpu_timeout_secs, num_gpu_timeout_secs))
        self.runtime = Communicators(ranks, lambda: Buffer.num_sms, timeout)
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes of bfloat16 rows from all ranks with their ids and weights, a multiple of 2 MiB."""
        return _buffer_bytes(group_of(group)[1].size, num_max_tokens_per_rank, hidden, num_topk)

    @staticmethod
    def capture() -> EventHandle:
        """An event after everything queued on the current stream so far."""
        return EventHandle()

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(RDMA ranks, NVLink ranks): 1 and all, since commlib itself finds what connects ranks."""
        return 1, self.num_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(scale-out ranks, scale-up ranks): 1 and all."""
        return 1, self.num_ranks

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Return when all ranks have called it. with_cpu_sync: and their GPUs are idle. Others: ignored."""
        runtime = self._runtime()
        if with_cpu_sync and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        runtime.group.barrier()

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """What communicators take on a GPU, ``Buffer.num_sms``, whatever the arguments; even, at least 4."""
        require(num_scaleout_topk == 0, f"num_scaleout_topk must be 0, got {num_scaleout_topk}")
        return max(_LEAST_SMS, Buffer.num_sms)

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """The number that DeepEP would take, at most num_allocated_qps. commlib has none."""
        return min(num_sms * 16 + 1 if self.allow_hybrid_mode else min(num_sms, 9), self.num_allocated_qps)

    @outside_autograd
    def dispatch(
        self,
        x: Rows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Send each token once to every rank that owns one of its experts.

        Args:
            x: as for :meth:`Buffer.dispatch`.
            topk_idx: ``[T, K]`` int64 global ids, -1 leaves a place empty; None with a handle.
            topk_weights: ``[T, K]`` float32, or None; also with a handle.
            cumulative_local_expert_recv_stats: ``[L]`` int32; tokens of each local expert are added to it.
            num_experts: over all ranks, a multiple of them. With a handle, this and the next two are the
                handle's.
            num_max_tokens_per_rank: the most tokens of a rank, the same on all. None: the buffer's.
            expert_alignment: counts are rounded up to a multiple of it; with do_expand groups of rows begin
                at its multiples.
            num_sms, num_qps: ignored (num_sms: an attribute of the handle).
            previous_event: wait for it first; needs allocate_on_comm_stream, which has no other effect.
            previous_event_before_epilogue: wait for it first, too.
            async_with_compute_stream: return once the sizes are known; the event says when results may be
                used.
            handle: of an earlier dispatch with the same do_expand: send along its routes.
            do_handle_copy: handle.topk_idx is a copy, not the caller's.
            do_cpu_sync: False has no effect: sizes are exact, and the host waits for them. Not True with a
                handle.
            do_expand: rows grouped by local expert, one for each (token, expert).
            do_zero_padding: has no effect: padding between groups is zero. Needs do_expand.
            use_tma_aligned_col_major_sf: scales come with stride 1 along rows.

        Returns:
            recv_x (as x; ordered by source rank, then token, in groups with do_expand), recv_topk_idx ``[N,
            K]`` int64 local ids or -1 (None with do_expand), recv_topk_weights ``[N, K]`` or with do_expand
            ``[M]`` float32 (None where none were given), handle, event.

        Raises:
            Refused, ValueError, TypeError, commlib.PeerTimeout: as :meth:`Buffer.dispatch`.
        """
        runtime = self._before(
            previous_event, previous_event_before_epilogue, allocate_on_comm_stream, num_qps
        )
        require(not do_zero_padding or do_expand, "do_zero_padding needs do_expand")
        parcel = parcels.pack(x, use_tma_aligned_col_major_sf)
        given = {
            "num_experts": num_experts,
            "num_max_tokens_per_rank": num_max_tokens_per_rank,
            "expert_alignment": expert_alignment,
            "do_expand": do_expand,
        }
        known = self.num_max_tokens_per_rank
        if handle is None:
            shape, ids = sending.checked(given, known, self.num_ranks, topk_idx, parcel.sent)
        else:
            require(topk_idx is None, "topk_idx must be None with a handle, which has it")
            require(not do_cpu_sync, "do_cpu_sync cannot be True with a handle")
            shape, ids = handles.checked_shape(handle, given, len(parcel.sent)), handle.topk_idx
        if topk_weights is not None:
            layouts.check_beside(parcel.sent, topk_weights=topk_weights)
            layouts.check_weights("topk_weights", topk_weights, tuple(ids.shape))
        stats = cumulative_local_expert_recv_stats
        local = layouts.local_experts(shape.num_experts, self.num_ranks)
        handles.check_stats(stats, local, parcel.sent)
        work = Work(parcel.sent.device, lambda: runtime.stream(parcel.sent.device))
        call = (runtime, parcel, topk_weights, work, async_with_compute_stream)
        if handle is None:
            sms = num_sms or self.get_theoretical_num_sms(shape.num_experts, ids.shape[1])
            most = known if shape.num_max_tokens_per_rank <= known else None  # a call may say more
            handle, arrived = sending.dispatch(*call, shape, ids, most, sms, do_handle_copy)
        else:
            arrived = sending.dispatch_along(*call, route_of(handle, EPHandle))
        if stats is not None:
            handles.add_stats(stats, arrived.counts, work)
        idx = None if handle._recv_topk_idx is None else work.copied(handle._recv_topk_idx)
        event = work.end(async_with_compute_stream)
        route_of(handle, EPHandle).follows(event)
        return arrived.x, idx, arrived.weights, handle, event

    @outside_autograd
    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sum each token's rows over its experts or ranks, without weights.

        Args:
            x: rows in the order of the dispatch's recv_x, bfloat16; on the CPU also float16 and float32.
            handle: of the dispatch.
            topk_weights: ``[N, K]``, or with do_expand ``[M]``, float32: each place's value goes back to its
                token, from the rank that owns its expert.
            bias: ``[T, H]``, or two of them; where one rank gives two, all must.
            num_sms, num_qps: ignored.
            previous_event, previous_event_before_epilogue: as in :meth:`dispatch`.
            async_with_compute_stream, allocate_on_comm_stream: as in :meth:`dispatch`.

        Returns:
            ``[T, H]``; ``[T, K]`` float32, 0 where an id is -1, or None; event.

        Raises:
            Refused, ValueError, TypeError, commlib.PeerTimeout: as :meth:`Buffer.combine`.
        """
        runtime = self._before(
            previous_event, previous_event_before_epilogue, allocate_on_comm_stream, num_qps
        )
        route = route_of(handle, EPHandle)
        check_y(x, route)
        biases = biases_of(bias, x, route.handle.num_tokens)
        if topk_weights is not None:
            layouts.check_beside(x, topk_weights=topk_weights)
            topk = handle.topk_idx.shape[1]
            layouts.check_weights(
                "topk_weights", topk_weights, (route.rows,) if handle.do_expand else (route.rows, topk)
            )
        routing = route.ready()
        work = Work(x.device, lambda: runtime.stream(x.device))
        wide = handle.do_expand and not self.allow_multiple_reduction
        combined, weights = sum_rows(
            runtime, routing, x, biases, work, async_with_compute_stream, wide, topk_weights
        )
        return combined, weights, work.end(async_with_compute_stream)

    def _before(self, event: Any, later: Any, allocate_on_comm_stream: bool, num_qps: int) -> Communicators:
        """The beginning of both calls: after it their tensors may be read."""
        known = self.num_allocated_qps
        require(event is None or allocate_on_comm_stream, "previous_event needs allocate_on_comm_stream=True")
        require(num_qps <= known, f"num_qps is {num_qps}, but {known} are allocated")
        runtime = self._runtime()
        wait_for(event)
        wait_for(later)
        return runtime


def _buffer_bytes(ranks: int, tokens: int, hidden: int, topk: int) -> int:
    row = 2 * hidden + 12 * topk + _BYTES_BESIDE_A_ROW
    return -(-ranks * tokens * row // _UNIT) * _UNIT
