"""ExpertParallel: dispatch tokens to the ranks that own their experts, and combine what comes back."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from commlib import checks, ops
from commlib.arguments import as_bool, as_int
from commlib.arrays import AnyArray, Array, exporter_for
from commlib.calls import Combine, Dispatch, Redispatch
from commlib.checks import Layout, Overflow
from commlib.communicator import Communicator, refuse_forward_mode
from commlib.dispatched import Dispatched, Handle, check_handle, flat, unflat
from commlib.errors import CommError
from commlib.event import Event
from commlib.memory import MemoryReport, report_memory
from commlib.partition import SMPartition
from commlib.quantization import QuantFormat
from commlib.settings import (
    ANY_TOKENS,
    Bounds,
    Grouping,
    Settings,
    checked_timeout,
    dtype_of,
    startup_patience,
    startup_seconds,
)
from commlib.startup.connect import attach, resolve_device
from commlib.startup.group import ThreadGroup, resolve_group
from commlib.startup.topology import RoutingMode


class ExpertParallel:
    """Dispatch and combine of one MoE configuration over the ranks of a group.

    All ranks construct it together, and issue its operations in the same order. Those of one configuration
    and group share a communicator, so that a model may make one for each layer: see ``exclusive``.

    Attributes:
        rank, size: of the group.
        first_expert, num_local_experts: the experts of this rank.
        topology: which ranks share a node.

    Args:
        group: torch.distributed ProcessGroup, 1-D DeviceMesh, mpi4py communicator or commlib.Group. None:
            the default process group, else the ranks of the innermost launcher, which is torchrun or mpirun
            (MPI.COMM_WORLD), else one rank.
        num_experts: experts over all ranks. Rank r owns the contiguous block ``[r*E//R, (r+1)*E//R)``;
            E need not be a multiple of R.
        hidden: elements of a row.
        topk: experts for each token, at most 32.
        max_tokens: the most tokens that one rank sends in one call. None: not known. Slots then hold 4096
            rows at first (or ``capacity``), and where a dispatch needs more, all ranks take a heap of two,
            four, ... times the size before its rows are sent. Nothing is ever dropped.
        dtype: of rows: bfloat16, float16, float32 or float64; a torch.dtype, or its name or NumPy's.
        device: "cpu", "cuda" or "cuda:i". None: the in-process ranks' device, else the current CUDA device if
            there is one, else "cpu".
        num_sms: SMs (CUDA) or threads (CPU) for communication on this rank. None: what the performance model
            proposes (:func:`commlib.model.default_num_sms`), or half of this rank's share of the cores.
        capacity: rows a rank may receive in one dispatch. None: the worst case, ranks * max_tokens.
        slots: 1 to 255, each of ``capacity`` rows. Operations under way, lent buffers and zero-copy results
            hold one each. Other results of layout "rank" also stay in theirs, uncopied, while two slots stay
            free. CPU: memory is taken as it is first written, lowest slot first. CUDA: all of it is taken
            at once. None: 4 on CUDA; 128 on the CPU, fewer (8 at least) where all ranks' would take more than
            2 TiB of addresses.
        timeout: seconds that a rank waits for a peer before PeerTimeout; may be set later. None: that of the
            ExpertParallels that this rank has on the group and device, 600 where it has none.
        startup_timeout: seconds until construction ends with PeerTimeout where a rank does not come, or gets
            stuck. None: ``timeout`` where that is given, else 300. A Group of your own bounds itself.
        partition: communicate on its SMs (or cores) for communication, and on no others.
        link_gbps: GB/s (1e9 bytes) of this rank's link, one direction, to measure here what a slower
            interconnect leaves: dispatch is throttled where rows leave, combine where they come in. A rank's
            rows for itself do not count. None: no limit. One node only.
        routing: how rows go to ranks on other nodes, over UCX. "direct": each to each rank that wants it;
            sums have the bits of one node. "hierarchical": once to each node that wants it, to a gateway
            that passes it on; in combine a gateway sums its node's rows, rounded once, and one row comes
            back. "auto": whichever sends less, by the rule in docs/nodes.md.
        ranks_per_node: this many consecutive ranks are a node. None: COMMLIB_NODE_SIZE, else ranks that can
            map each other's memory are one (one host and PID namespace; GPUs: one NVLink domain).
        exclusive: False: share one communicator, its memory and its slots with all others of the same
            arguments and group that are open; the ranks then use all of these in one order (else
            CallMismatch). On one group and device all have one timeout, and fail together. True: none of
            this, for a model or a thread of its own.
        grouping: how rows of layout "expert" get to the groups of their experts, and back. "direct": the
            sender writes each to all its places, where it stays; combine reads all of them. "once": each
            goes to a rank once, which copies it to its groups; what its experts made of it is summed before
            it goes back. The bits are the same. "auto": whichever takes less time for links and memory
            (:func:`commlib.model.goes_direct`): direct where ranks share memory. Across nodes always once.
        max_grouped_rows: for how many rows grouped by expert a slot has room, padding included, where they go
            there directly. A rank that would get more gets them as with "once", and nothing is lost. None:
            CPU: as many as ``capacity`` rows can make. CUDA: what they make on average, and a quarter more.
            Also how many the result of a bounded dispatch has; None: as many as can come.
        rows_per_expert: how many rows layout "batched" has for each expert. None: as many as can come,
            ``capacity``, which is a lot of memory on a GPU.

    Raises:
        ValueError, TypeError: an argument that cannot be used (on this rank); or another timeout than that of
            the ExpertParallels it would share it with.
        ConfigMismatch: ranks gave different arguments, or are of different builds; the text names them.
        PeerTimeout: ranks did not come within ``startup_timeout``; the text names them.
        CommError: there is no UCX to go between nodes, a limit was reached (the text names it), launchers
            contradict each other, or another rank failed here for any reason; the text gives it.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        num_experts: int,
        hidden: int,
        topk: int,
        max_tokens: int | None,
        dtype: torch.dtype | np.dtype[Any] | type | str = torch.bfloat16,
        device: torch.device | str | None = None,
        num_sms: int | None = None,
        capacity: int | None = None,
        slots: int | None = None,
        timeout: float | None = None,
        startup_timeout: float | None = None,
        partition: SMPartition | None = None,
        link_gbps: float | None = None,
        routing: RoutingMode = "auto",
        ranks_per_node: int | None = None,
        exclusive: bool = False,
        grouping: Grouping = "auto",
        max_grouped_rows: int | None = None,
        rows_per_expert: int | None = None,
    ) -> None:
        patience = startup_patience(startup_timeout, timeout)
        self.group = resolve_group(group, patience)
        self.rank, self.size = self.group.rank, self.group.size
        with self.group.converse(patience) as talk:
            startup_seconds(startup_timeout, timeout)
            self.device = where = resolve_device(device, self.group)
            tokens = ANY_TOKENS if max_tokens is None else max_tokens
            asked = Settings(
                *(num_experts, hidden, topk, tokens, dtype_of(dtype), where, num_sms, capacity, slots),
                partition=partition,
                link_gbps=link_gbps,
                routing=routing,
                ranks_per_node=ranks_per_node,
                grows=max_tokens is None,
                exclusive=exclusive,
                grouping=grouping,
                max_grouped_rows=max_grouped_rows,
                rows_per_expert=rows_per_expert,
            )
            timeout = None if timeout is None else checked_timeout(timeout)
            self._attachment = attach(talk, asked.checked(self.size), timeout)
        self._comm: Communicator = self._attachment.communicator
        self.topology = self._comm.topology
        self._name = self._attachment.name()
        self._sizes = (self._comm.width, self._comm.experts)
        self.first_expert, self.num_local_experts = self._comm.first_expert, self._comm.experts
        if isinstance(self.group, ThreadGroup):
            self.group.communicators.add(self._comm)

    # -- operations ----------------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Array | tuple[Array, AnyArray],
        topk_idx: AnyArray | None = None,
        topk_weights: AnyArray | None = None,
        *,
        layout: Layout | None = None,
        align: int = 1,
        handle: Handle | None = None,
        zero_copy: bool = False,
        overflow: Overflow = "error",
        async_op: bool = False,
        in_waves: bool = False,
        previous_event: Event | None = None,
        bounded: bool = False,
        quantize: QuantFormat | None = None,
    ) -> Dispatched[Array]:
        """Send each token once to every rank that owns at least one of its experts.

        Differentiable in ``x`` and ``topk_weights``. All ranks call it, all with ``topk_weights`` or all
        without; T may be 0.

        Args:
            x: ``[T, hidden]``, ``0 <= T <= max_tokens``; T may differ by rank. Rows may lie apart (a
                stride), elements of a row may not. Tensor, or NumPy or CuPy array; results are of the same
                kind. Or ``(rows [T, W], scales [T, S])`` of any types, the same on all ranks; a row and its
                scales take no more bytes than ``hidden`` elements. With ``handle`` rows alone may differ as
                well. Rows with scales, or of a type that combine cannot sum, have no gradient.
            topk_idx: ``[T, topk]`` int64 or int32, global expert ids; -1 leaves a place empty. May be None
                with ``handle``. Copied: it may change as soon as the call returns.
            topk_weights: ``[T, topk]`` of any floating type, taken as float32 (float64 for float64 rows).
            layout: "rank" (default): unique rows. "expert": rows grouped by local expert. "batched" (bounded
                only): for each local expert ``rows_per_expert`` rows, of which the first are its own.
            align: with "expert": each group is padded with zero rows to a multiple of this, 1 to 65536.
            handle: use the routing, layout and align of that dispatch: no plan and no counts.
            zero_copy: never copy out of a slot: raise HandleError where none is free. Without it rows are
                copied when fewer than two others are free. With "expert" only where rows go straight to
                their groups (see ``grouping``); more than a slot has room for are then copied all the same.
            overflow: where a rank would receive more than ``capacity`` rows: "error" raises on all ranks
                before rows are sent; "drop" drops its last rows, by source rank, then token.
            async_op: return when the counts are known; the rows follow on the communication threads, and
                ``Dispatched.event`` says when they are there.
            in_waves: rows of lower-numbered local experts come first, so that
                :meth:`Dispatched.wait_expert` need not wait for all; the same on all ranks. The local experts
                of each rank are cut into four equal waves (several nodes: one). "expert" and ``async_op``
                only, and not with ``handle``. Backward waits for the gradient of all rows: no overlap there.
            previous_event: an event to wait for first.
            bounded: on all ranks alike: results have one size, as many rows as there is room for, and no host
                waits to hear how many come; see docs/bounded.md. Rows past that are left out, evenly over
                experts, and counted in ``Dispatched.dropped``; unless ``overflow="drop"``, the next call on
                the rank that left them out raises CapacityExceeded. An id out of range counts as -1, and the
                next call raises. Rows of the result that are none are undefined, zero where autograd records.
            quantize: convert rows (bfloat16, float16, float32) on the way, on all ranks alike, to "fp8_e4m3",
                "fp8_e4m3_ue8m0", "mxfp8" or "int8": results are those of the pair (rows, scales) that
                :func:`commlib.quantize` makes. No gradient goes through, no ``in_waves``: docs/quantize.md.

        Returns:
            Dispatched.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype or range; nothing has been sent.
            NotImplementedError: forward-mode AD, torch.vmap or torch.func.grad, which have no rule.
            RuntimeError, MemoryError: there is no memory for the results, whose size is known late: the
                communicator is given up, and the others raise CommError.
            CapacityExceeded: on all ranks; nothing has been sent.
            PeerTimeout: a rank did not come within ``timeout`` seconds, or is gone.
            HandleError: no slot is free, or the handle is released or another communicator's.
        """
        self._before(async_op, previous_event)
        align = as_int("align", align)
        zero_copy, in_waves = as_bool("zero_copy", zero_copy), as_bool("in_waves", in_waves)
        given, beside = checks.rows_and_scales(x)
        rows, weights = self._tensor("x", given), self._weights("topk_weights", topk_weights)
        scales = None if beside is None else self._tensor("scales", beside)
        bounded, to = as_bool("bounded", bounded), checks.quantization_of(quantize, scales)
        if scales is not None or to or rows.dtype != self._comm.settings.dtype:
            checks.check_gradient(self.settings, rows, scales, ops.wants_gradient(rows, scales, weights), to)
        fresh = handle is None and not bounded and not to
        checks.check_waves(in_waves, fresh and layout == "expert" and async_op)
        if handle is not None:
            check_handle(self, handle, layout, topk_idx)
            checks.check_layout(handle.layout, zero_copy, overflow, self._comm.groups_in_slots, True)
            known = Redispatch(rows, weights, handle._plan, handle._grouped, zero_copy, scales, quantize=to)
            # Before the rows, with which it is there. Of a bounded dispatch it may not be known yet.
            groups = self._copied(handle._plan.groups) if handle._counts is None else handle._counts
            again, event = ops.redispatch(self._attachment, known, async_op)
            return Dispatched._of(handle, exporter_for(given), again, groups, event)
        layout = "rank" if layout is None else layout
        checks.check_layout(layout, zero_copy, overflow, self._comm.groups_in_slots, bounded)
        checks.check_align(self._comm, align)
        bounds: Bounds = self._comm.bounds(layout, align) if bounded else Bounds()
        idx = checks.copied_topk_idx(self.device, topk_idx)
        grouped, drop = layout != "rank", overflow == "drop"
        call = Dispatch(
            *(rows, idx, weights, self._name, *self._sizes, grouped, align, drop, zero_copy, scales),
            *(*bounds, bounded and ops.wants_gradient(rows, weights), to),
        )
        in_waves = in_waves and len(self.topology.hosts) == 1
        came, event = ops.dispatch(self._attachment, call, async_op, in_waves)
        handle = Handle(self, came.plan(call), layout, align, came.counts if bounded else None)
        return Dispatched._of(handle, exporter_for(given), came, came.counts, event)

    @overload
    def combine(
        self,
        y: Array,
        handle: Handle,
        *,
        weights: AnyArray | None = None,
        bias: AnyArray | None = None,
        out: AnyArray | None = None,
        async_op: Literal[False] = False,
        previous_event: Event | None = None,
    ) -> Array: ...

    @overload
    def combine(
        self,
        y: Array,
        handle: Handle,
        *,
        weights: AnyArray | None = None,
        bias: AnyArray | None = None,
        out: AnyArray | None = None,
        async_op: Literal[True],
        previous_event: Event | None = None,
    ) -> tuple[Array, Event]: ...

    @overload
    def combine(
        self,
        y: Array,
        handle: Handle,
        *,
        weights: AnyArray | None = None,
        bias: AnyArray | None = None,
        out: AnyArray | None = None,
        async_op: bool,
        previous_event: Event | None = None,
    ) -> Array | tuple[Array, Event]: ...

    def combine(
        self,
        y: AnyArray,
        handle: Handle,
        *,
        weights: AnyArray | None = None,
        bias: AnyArray | None = None,
        out: AnyArray | None = None,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> Any:
        """Sum, for each token, the rows that its experts made of it, at the token's own rank.

        Sums are taken in float32 (float64 for float64 rows), over a rank's experts in order of top-k place
        with one rounding, then over ranks in ascending order with one rounding: bitwise reproducible.
        Differentiable in ``y``, ``weights`` and ``bias``. The gradient of a weight, a sum along its row in
        the same type, has the same bits every time, but not the same on a CPU as on a GPU.

        Args:
            y: ``[num_rows, hidden]``, as ``Dispatched.x`` of the handle's dispatch. Not copied when it is a
                ``combine_buffer`` or a ``Dispatched.x`` that lies in a slot. Or rows of
                another floating type or width, the same on all ranks, of no more bytes; ``bias``, ``out``
                and the result are as y is.
            handle: of the dispatch.
            weights: ``[num_rows]`` of any floating type, one for each row of y (layout "expert":
                ``Dispatched.topk_weights``). None: rows are summed unweighted.
            bias: ``[T, hidden]``, added once.
            out: ``[T, hidden]`` contiguous, written and returned; not differentiable. It shares no memory
                with ``y``, ``weights`` or ``bias``, does not require grad and is not read-only.
            async_op: return ``(out, event)`` at once.
            previous_event: an event to wait for first.

        Returns:
            ``[T, hidden]``, or with ``async_op`` a pair of that and an Event. Tokens without experts are 0.

        Raises:
            ValueError, TypeError, NotImplementedError, PeerTimeout, HandleError: as dispatch.
        """
        self._before(async_op, previous_event)
        check_handle(self, handle)
        rows = flat(handle, self._tensor("y", y))
        row_weights = flat(handle, self._weights("weights", weights), 1)
        bias_rows = None if bias is None else self._tensor("bias", bias)
        call = Combine(rows, row_weights, bias_rows, None, handle._plan, handle._grouped)
        if out is None:
            (sums, _), event = ops.combine(self._attachment, call, async_op)
            result = exporter_for(y)(sums)
        else:
            target = checks.tensor_on(self.device, "out", out, writable=True)
            checks.check_out(target, handle.num_tokens, self.settings, call)
            event = ops.combine_into(target, self._attachment, call, async_op)
            result = out
        return (result, event) if async_op else result

    def combine_buffer(self, handle: Handle) -> Tensor:
        """Memory in the symmetric heap for y, ``[num_rows, hidden]``: combine then copies nothing.

        Good for one combine, and not to be written afterwards: other ranks may still read it when that has
        returned. It holds a slot until both that is done and the tensor is gone. Padding rows of layout
        "expert" need not be written.

        Raises:
            HandleError: no slot is free, or the handle is released or another communicator's.
            ValueError: the handle's layout is "expert", and rows do not go straight to their places here (see
                ``grouping``), or are more than a slot has room for.
        """
        check_handle(self, handle)
        checks.check_room(self._comm, handle.layout, handle.num_rows)
        self._attachment.check_open()
        return unflat(handle, self._comm.lend_rows(handle.num_rows, once=True))

    def record_stream(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        """Let ``stream`` use a result or a lent buffer until the tensor goes, like ``Tensor.record_stream``.

        Not needed for the stream that was current in the call that gave the tensor. Another one that has
        waited for its event needs it for tensors outside the symmetric heap, as for any of PyTorch's: results
        grouped by expert, sums, weights. ``Tensor.record_stream`` does nothing for memory of the heap. This
        does nothing on the CPU.
        """
        self._comm.backend.record_stream(tensor, stream)

    # -- the rest ------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """What it was made with; where ``max_tokens`` was not known, the room that there is now."""
        return self._comm.settings

    @property
    def timeout(self) -> float:
        """Seconds that a rank waits for a peer.

        Setting it affects later operations of this rank, of all ExpertParallels on the group and device.

        Raises:
            ValueError, TypeError: not a positive number, or more than ten years.
        """
        return self._comm.team.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._comm.team.set_timeout(checked_timeout(seconds))

    def synchronize(self) -> None:
        """Block until all operations are done, also those of others that share the communicator.

        On a GPU this is how the host learns that one failed; the next operation says so as well. CUDA graphs
        that the current stream runs are waited for, too.

        Raises:
            PeerTimeout, CallMismatch: an operation failed.
        """
        self._attachment.check_open()
        self._comm.backend.synchronize()

    def stats(self) -> dict[str, int]:
        """Counts since construction, of this rank.

        Operations; rows received; (token, rank) pairs dropped. And of all that share the communicator: how
        often it took a larger heap; messages to other nodes, and the bytes in them (without what UCX, TCP and
        the wire add); messages refused because they did not prove their sender.
        """
        core, (messages, sent) = self._comm.core, self._comm.core.network_sent
        network = {"messages": messages, "bytes": sent, "refused": core.network_refused}
        shared = {"growths": self._comm.growths} | {f"network_{name}": n for name, n in network.items()}
        return self._attachment.stats | shared

    def memory_report(self) -> MemoryReport:
        """Print, and return, what this rank's communicators on the group hold and may come to hold."""
        report = report_memory(self._comm)
        print(report)
        return report

    def close(self) -> None:
        """Issue no more operations. Using it afterwards raises CommError.

        The last of those that share a communicator finishes what is under way and tells the other ranks.

        Raises:
            PeerTimeout, CallMismatch: an operation failed, and no call has raised it yet (on a GPU, where
                operations only queue). The communicator is closed all the same.
        """
        self._attachment.close()

    def __enter__(self) -> ExpertParallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except (CommError, ValueError):
            if kind is None:  # else the exception on its way says more
                raise

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        return self  # a copy of a model (an average of its weights) has the same ranks

    def __copy__(self) -> ExpertParallel:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "an ExpertParallel connects running processes and cannot be pickled, nor can modules that hold "
            "one. Save model.state_dict(), and load it into a model that is built anew (docs/training.md)"
        )

    def __repr__(self) -> str:
        return f"ExpertParallel(rank={self.rank}, size={self.size}, {self.settings})"

    # -- inside --------------------------------------------------------------------------------------------

    def _tensor(self, name: str, array: AnyArray) -> Tensor:
        return checks.tensor_on(self.device, name, array)

    def _weights(self, name: str, weights: AnyArray | None) -> Tensor | None:
        if weights is None:
            return None
        given, wanted = self._tensor(name, weights), self._comm.weight_dtype
        checks.check_readable(name, given)
        if not given.is_floating_point():
            raise ValueError(f"{name} must be of a floating type, got {given.dtype}")
        return given.to(wanted).contiguous()  # exact, but for float64 beside narrower rows

    def _copied(self, tensor: Tensor) -> Tensor:
        """For the user, who may change it; compiled operations are not asynchronous."""
        return tensor.clone() if torch.compiler.is_compiling() else self._comm.backend.copied(tensor)

    def _before(self, async_op: bool, previous_event: Event | None) -> None:
        as_bool("async_op", async_op)
        refuse_forward_mode()
        if async_op and torch.compiler.is_compiling():
            raise ValueError("async_op cannot be traced by torch.compile")
        if previous_event is not None:
            checks.check_event(previous_event)
            previous_event.wait()
