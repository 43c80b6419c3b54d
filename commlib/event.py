"""When an operation issued with ``async_op=True`` is done."""

from __future__ import annotations

from typing import Any

from commlib import _core


class Event:
    """The end of one asynchronous operation on the CPU's pool of communication threads.

    Tensors that the operation reads or writes are kept alive until it is done. Reading a result
    before :meth:`wait` has returned gives undefined values.
    """

    def __init__(self, comm: _core.Communicator, ticket: _core.Ticket, keep: tuple[Any, ...]) -> None:
        self._comm = comm
        self._ticket = ticket
        self._keep: tuple[Any, ...] | None = keep

    def query(self) -> bool:
        """Whether the operation is done; never blocks."""
        return self._ticket.done

    def wait(self) -> None:
        """Block the calling thread until the operation is done.

        Raises:
            PeerTimeout: a rank did not do its part in time.
        """
        self._comm.wait(self._ticket)
        self._keep = None

    def synchronize(self) -> None:
        """The same as :meth:`wait` on the CPU."""
        self.wait()
