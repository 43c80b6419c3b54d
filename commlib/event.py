"""When an operation issued with ``async_op=True`` is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor

from commlib import _core


class Recorded(Protocol):
    """An asynchronous operation that autograd records."""

    def finish(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Record that these results, which are there, are used from here on."""


class Event(ABC):
    """The end of one asynchronous operation.

    The operation itself keeps the tensors that it reads or writes alive, whatever becomes of the event. Using
    a result before :meth:`wait` or :meth:`finish` gives undefined values.
    """

    recorded: Recorded | None = None  # None: autograd does not know of the operation
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
            ValueError: autograd records the operation, and these are not its results.
            RuntimeError: in backward, where the operation's results were used as well, or those of two calls.
        """
        self.wait()
        return tensors if self.recorded is None else self.recorded.finish(tensors)

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
        self.recorded = None
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
