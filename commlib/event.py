"""When an operation issued with ``async_op=True`` is done."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from commlib import _core, split
from commlib.split import Split


class Event(ABC):
    """The end of one asynchronous operation.

    The operation itself keeps the tensors that it reads or writes alive, whatever becomes of the event. Using
    a result before :meth:`wait` or :meth:`finish` gives undefined values.
    """

    split: Split | None = None  # where autograd records the operation
    waves: _core.PendingDispatch | None = None  # the dispatch, where its rows come in waves

    def finish(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Wait, and return the operation's results for use.

        Like :meth:`wait`, but the backward of this call starts the operation's gradient and the backward of
        the operation waits for it: what runs between the two calls overlaps in backward as well. Not
        differentiable twice.

        Args:
            tensors: the operation's floating-point results, in order: ``d.x, d.topk_weights`` of a dispatch
                (:meth:`commlib.Dispatched.finish` does it), ``out`` of a combine.

        Raises:
            RuntimeError: in backward, where the results of two calls were used.
        """
        self.wait()
        return tensors if self.split is None else split.finish(self.split, tensors)

    @abstractmethod
    def query(self) -> bool:
        """Whether the operation is done; never blocks."""

    @abstractmethod
    def wait(self) -> None:
        """Make what the caller does next come after the operation.

        CPU: blocks the calling thread. CUDA: the current stream waits, the host does not.

        Raises:
            PeerTimeout: a rank did not do its part in time (CPU; on CUDA see :meth:`synchronize`).
        """

    def wait_expert(self, expert: int) -> None:
        """Wait for one local expert's rows; where they do not come in waves, for the operation.

        From here on results are used directly, so :meth:`finish` records nothing any more.
        """
        self.split = None
        if self.waves is None:
            self.wait()
        else:
            self._wait_wave(self.waves, expert)

    @abstractmethod
    def _wait_wave(self, waves: _core.PendingDispatch, expert: int) -> None: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Block the calling thread until the operation is done.

        Raises:
            PeerTimeout: a rank did not do its part in time.
        """


class CpuEvent(Event):
    """On the CPU's pool of communication threads."""

    def __init__(self, comm: _core.Communicator, ticket: _core.Ticket) -> None:
        self._comm = comm
        self._ticket = ticket

    def query(self) -> bool:
        return self._ticket.done

    def wait(self) -> None:
        self._comm.wait(self._ticket)

    def _wait_wave(self, waves: _core.PendingDispatch, expert: int) -> None:
        self._comm.wait_expert(waves, self._ticket, expert, 0)

    def synchronize(self) -> None:
        self.wait()


class CudaEvent(Event):
    """On the communication stream of a CUDA device."""

    def __init__(
        self,
        comm: _core.Communicator,
        event: torch.cuda.Event,
        device: torch.device,
        addresses: list[int],
        in_step: bool = False,
    ) -> None:
        self._comm = comm
        self._event = event
        self._device = device
        self._addresses = addresses  # of what the operation works on
        self._in_step = in_step  # the host waits as well

    def query(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.wait(self._using_stream())
        if self._in_step:
            self.synchronize()

    def _wait_wave(self, waves: _core.PendingDispatch, expert: int) -> None:
        stream = self._using_stream()
        self._comm.wait_expert(waves, None, expert, stream.cuda_stream)
        if self._in_step:
            stream.synchronize()

    def _using_stream(self) -> torch.cuda.Stream:
        """The current stream, which from now on may use the results."""
        stream = torch.cuda.current_stream(self._device)
        self._comm.note_uses(self._addresses, stream.cuda_stream)
        return stream

    def synchronize(self) -> None:
        self._comm.wait_event(self._event.cuda_event)
