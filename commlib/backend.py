"""What differs between devices on the Python side: memory for results, and the order of work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from commlib import _core
from commlib.errors import CommError
from commlib.event import CpuEvent, CudaEvent, Event

_POOLED_BYTES = 1 << 20  # results of at least this size come from the communicator's own pool of buffers


Span = Callable[[], tuple[float, float]]  # begin and end of a finished operation, in seconds


@dataclass(eq=False)
class Trace:
    """Where the operations of a communicator are noted for one who traces it.

    Attributes:
        zero: CUDA: the event whose time is 0.
        notes: name and span of each operation.
    """

    zero: torch.cuda.Event | None = None
    notes: list[tuple[str, Span]] = field(default_factory=list)


class Backend(ABC):
    """One rank's device."""

    device: torch.device
    core: _core.Communicator
    traces: tuple[Trace, ...] = ()  # where operations are noted now

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nothing = torch.empty(0, dtype=torch.float32, device=device)
        self._ints = torch.empty(0, dtype=torch.int64, device=device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """A new tensor on the device."""
        if dtype == torch.int64:
            return self._ints.new_empty(shape)  # quicker than naming the device
        return torch.empty(shape, dtype=dtype, device=self.device)

    def nothing(self) -> Tensor:
        """A new tensor without elements, float32: in place of a result that there is not."""
        return self._nothing.new_empty(0)

    @abstractmethod
    def new_rows(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """Memory for rows that the user will own."""

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy that includes what communication issued so far writes."""
        return tensor.clone()

    @property
    def idle_bytes(self) -> int:
        """Bytes of results given back and kept for the next ones."""
        return 0

    def go_on_from(self, before: Backend) -> None:
        """Take the place of one of the same rank: its traces go on here."""
        self.traces = before.traces

    def close(self) -> None:
        """Finish what is under way and tell the other ranks."""
        self.core.close()

    @abstractmethod
    def begin_plan(self) -> None:
        """The plan of the dispatch issued next sees what the caller's work has produced so far."""

    @abstractmethod
    def begin(self) -> None:
        """Communication issued next sees what the caller's work has produced so far."""

    def give_up(self, why: str) -> None:
        """Called after an error between plan and rows: other ranks need not wait, and tensors may go."""
        self.core.give_up(why)

    @abstractmethod
    def end(
        self, name: str, ticket: _core.Ticket | None, keep: tuple[Any, ...], async_op: bool
    ) -> Event | None:
        """The caller's work issued next sees the results, or with ``async_op`` after the event only.

        Args:
            name: of the operation.
            ticket: what the core returned.
            keep: tensors that the operation uses. On a GPU their memory must not be reused before it is done;
                on the CPU the core keeps them.
            async_op: whether the caller waits for an event.
        """

    def record_stream(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:  # noqa: B027
        """``stream`` uses ``tensor`` until it goes, also where its memory is the heap's."""


class CpuBackend(Backend):
    """Threads on the host: an operation that is not asynchronous is done when its call returns."""

    core: _core.CpuCommunicator

    def __init__(self, core: _core.CpuCommunicator) -> None:
        super().__init__(torch.device("cpu"))
        self.core = core

    def new_rows(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        if rows * hidden * dtype.itemsize < _POOLED_BYTES:
            return torch.empty(rows, hidden, dtype=dtype)
        return torch.from_dlpack(self.core.new_rows(rows))

    @property
    def idle_bytes(self) -> int:
        return self.core.idle_bytes

    def begin_plan(self) -> None:
        pass

    def begin(self) -> None:
        pass

    def end(
        self, name: str, ticket: _core.Ticket | None, keep: tuple[Any, ...], async_op: bool
    ) -> Event | None:
        if ticket is None:
            return None
        for trace in self.traces:
            trace.notes.append((name, lambda: (ticket.begun, ticket.ended)))
        return CpuEvent(self.core, ticket) if async_op else None


class CudaBackend(Backend):
    """Kernels on a stream of their own: streams order everything, and the host goes on.

    With ``in_step`` the host waits: see :func:`commlib.run_ranks`.
    """

    def __init__(
        self,
        core: _core.Communicator,
        stream: torch.cuda.Stream,
        free_sms: Callable[[], None],
        in_step: bool = False,
    ) -> None:
        super().__init__(stream.device)
        self.core = core
        self.stream = stream
        self._plan_stream = torch.cuda.ExternalStream(core.plan_stream, self.device)
        self._in_step = in_step
        self._free_sms = free_sms  # called when no operation can come any more
        self._begun = torch.cuda.Event()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._free_sms()

    def new_rows(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, hidden, dtype=dtype, device=self.device)

    def copied(self, tensor: Tensor) -> Tensor:
        with torch.cuda.stream(self.stream):
            copy = tensor.clone()
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy

    def begin_plan(self) -> None:
        _refuse_capture()
        self._plan_stream.wait_stream(torch.cuda.current_stream(self.device))

    def begin(self) -> None:
        _refuse_capture()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        if self.traces:
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record(self.stream)

    def give_up(self, why: str) -> None:
        self.core.give_up(why)
        torch.cuda.current_stream(self.device).wait_stream(self._plan_stream)

    def end(
        self, name: str, ticket: _core.Ticket | None, keep: tuple[Any, ...], async_op: bool
    ) -> Event | None:
        if self.traces:
            begun, ended = self._begun, torch.cuda.Event(enable_timing=True)
            ended.record(self.stream)
            for trace in self.traces:
                assert trace.zero is not None
                trace.notes.append((name, span_of(trace.zero, begun, ended)))
        current = torch.cuda.current_stream(self.device)
        tensors = [t for t in keep if isinstance(t, Tensor) and t.is_cuda]
        addresses = [t.data_ptr() for t in tensors]
        # For those in slots, which record_stream knows nothing of.
        self.core.note_uses(addresses, current.cuda_stream)
        if not async_op:
            # The current stream waits here, so memory that it gives back is not reused too early.
            current.wait_stream(self.stream)
            if self._in_step:
                self.core.synchronize()
            return None
        for tensor in tensors:
            tensor.record_stream(self.stream)
        event = self.stream.record_event()
        return CudaEvent(self.core, event, self.device, addresses, in_step=self._in_step)

    def record_stream(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        self.core.note_uses([tensor.data_ptr()], stream.cuda_stream)
        tensor.record_stream(stream)


def span_of(zero: torch.cuda.Event, begun: torch.cuda.Event, ended: torch.cuda.Event) -> Span:
    """From events, the first at time 0. Waits for their own streams only: others may wait for us."""

    def span() -> tuple[float, float]:
        ended.synchronize()
        return zero.elapsed_time(begun) / 1e3, zero.elapsed_time(ended) / 1e3

    return span


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise CommError(
            "dispatch and combine cannot be captured in a CUDA graph: what ranks tell each other "
            "carries the number of the call"
        )
