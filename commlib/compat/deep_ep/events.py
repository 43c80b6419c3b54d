"""Events: when work is done, and what is left to do then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from commlib.compat.deep_ep.errors import Refused, require
from commlib.event import Event

Step = Callable[[], Any]


class EventHandle:
    """The end of everything queued on the current CUDA stream so far; on the CPU there is nothing to wait
    for.

    Those that ``dispatch`` and ``combine`` return stand for an operation instead. Its results are complete
    once it has been waited for, on either device.
    """

    _events: Sequence[Event] = ()
    _steps: Sequence[Step] = ()
    _inference = False  # whether the call, and so its results, was made in inference mode
    _recorded: torch.cuda.Event | None = None

    def __init__(self) -> None:
        self._lock = threading.Lock()
        if torch.cuda.is_initialized():  # else nothing has been queued on any stream
            self._recorded = torch.cuda.current_stream().record_event()

    @classmethod
    def _of(cls, events: Sequence[Event], steps: Sequence[Step]) -> EventHandle:
        """The end of operations, and of steps that the first waiter then takes."""
        made = cls.__new__(cls)
        made._lock = threading.Lock()
        made._events, made._steps = tuple(events), tuple(steps)
        made._inference = torch.is_inference_mode_enabled()
        return made

    def current_stream_wait(self) -> None:
        """Make what the caller does next come after the event: CPU: block; CUDA: the current stream waits.

        Raises:
            commlib.PeerTimeout: a rank did not do its part in time (CPU).
        """
        for event in self._events:
            event.wait()
        with self._lock, torch.inference_mode(self._inference), torch.no_grad():
            while self._steps:
                self._steps[0]()
                self._steps = self._steps[1:]  # a step that raised stays for the next wait
        if self._recorded is not None:
            torch.cuda.current_stream().wait_event(self._recorded)


class EventOverlap:
    """An EventHandle, or None after a call that was not asynchronous.

    As a context manager it waits at the end: ``with event: compute()``, and with
    ``event(release_handle=True)`` it then lets go of the handle.

    Attributes:
        event: the handle.
        extra_tensors: kept as long as this is.
        hook_after_wait: the function that the next wait calls.
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Step | None = None
        self._release = False

    def current_stream_wait(self, release_handle: bool = False) -> Any:
        """Wait as the handle does, then call the hook, once.

        Returns:
            What the hook returned; None without one.

        Raises:
            Refused: there is no event: the call was not asynchronous.
        """
        if self.event is None:
            raise Refused("there is no event to wait for: the call that returned this was not asynchronous")
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        result = None if hook is None else hook()
        if release_handle:
            self.event = None
        return result

    def wait(self) -> Any:
        """The same as :meth:`current_stream_wait`."""
        return self.current_stream_wait()

    def register_hook_after_wait(self, hook_after_wait: Step) -> None:
        """Call ``hook_after_wait`` after the next wait; one at a time.

        Raises:
            Refused: one has been registered already.
        """
        require(self.hook_after_wait is None, "a hook is registered already, and has not been called yet")
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        self._release = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: object) -> None:
        release, self._release = self._release, False
        if self.event is not None:
            self.current_stream_wait(release)


def wait_for(previous_event: Any) -> None:
    """Make what follows come after an event that a caller passed; at once if None or of a synchronous call.

    Raises:
        TypeError: it is no event.
    """
    event = previous_event.event if isinstance(previous_event, EventOverlap) else previous_event
    if event is None:
        return
    if not isinstance(event, EventHandle):
        raise TypeError(f"an event must be an EventOverlap or EventHandle, got {type(event).__name__}")
    event.current_stream_wait()


class Work:
    """Operations under way for one call, and the steps that make DeepEP's results of theirs.

    Args:
        device: of the operations.
        stream: on which steps run that nothing waits for yet (CUDA).
    """

    def __init__(self, device: torch.device, stream: Callable[[], torch.cuda.Stream]) -> None:
        self._device, self._stream = device, stream
        self._events: list[Event] = []
        self._steps: list[Step] = []
        self._touched: list[Tensor] = []

    def add(self, event: Event | None) -> None:
        """Add an operation; None: one that is done."""
        if event is not None:
            self._events.append(event)

    def then(self, step: Step, *touched: Tensor) -> None:
        """Add a step, taken when all operations are done, with these tensors."""
        self._steps.append(step)
        self._touched += touched

    def settled(
        self,
        given: Tensor,
        rows: int | None = None,
        fill: int = 0,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """What an operation writes, as a dense tensor of ``rows`` rows, the last ones filled.

        Where ``given`` is that already, it is returned itself, and is complete when the operation is.
        """
        rows = len(given) if rows is None else rows
        dtype = given.dtype if dtype is None else dtype
        if out is None and rows == len(given) and dtype == given.dtype and given.is_contiguous():
            return given
        if out is None:
            shape = (rows, *given.shape[1:])
            out = torch.zeros(shape, dtype=dtype, device=given.device)
            if fill:
                out.fill_(fill)
        target = out[: len(given)]
        self.then(lambda: target.copy_(given), out, given)
        return out

    def copied(self, given: Tensor) -> Tensor:
        """A copy of what an operation writes, which the caller may change."""
        out = torch.empty_like(given)
        self.then(lambda: out.copy_(given), out, given)
        return out

    def rest(self) -> EventHandle:
        """What is left, for whoever waits for it."""
        return EventHandle._of(self._events, self._steps)

    def end(self, asynchronous: bool) -> EventOverlap:
        """The call's event; without ``asynchronous`` its results are complete now."""
        handle = self.rest()
        if not asynchronous:
            handle.current_stream_wait()
            return EventOverlap()
        if self._device.type == "cuda" and self._steps:
            # Callers need not wait through the event: they may synchronise the device.
            stream = self._stream()
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                handle.current_stream_wait()
                handle._recorded = stream.record_event()
            for tensor in self._touched:
                tensor.record_stream(stream)
        return EventOverlap(handle)
