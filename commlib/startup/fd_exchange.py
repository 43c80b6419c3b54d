"""Open files from rank to rank: device memory of cuMemCreate is one, and a peer maps what it is sent.

Each rank listens in a directory that only its user may enter, and connects to every rank beside it. What
comes in must be from the same user and from the very process that the rank said it is. A rank that fails
closes its connections at once, so that ranks that wait for it see that, as they see a death.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from commlib.errors import CommError
from commlib.startup.conversation import Group, gather

Address = tuple[int, int, int, bytes, bytes]  # as _core.Communicator.address()

_NAME = "rank"  # of the socket in its directory
_ONE_USER = (
    "Ranks on one host must run as one user and see each other's /proc (same PID namespace: one container, "
    "or docker run --pid=host)."
)


def exchange_fds(
    group: Group, addresses: list[Address], near: Sequence[int], timeout: float = 60.0
) -> list[Address]:
    """The same addresses, with file descriptors of this process in place of their owners'.

    Addresses of ranks in this very process or on other nodes, and those without a file descriptor (-1), do
    not change. Every rank calls it. Descriptors travel over sockets of this host (SCM_RIGHTS), only between
    processes of this user. :func:`close_fds` closes what came.

    Args:
        group: of all ranks, or a conversation of theirs.
        addresses: of all ranks, equal on each.
        near: the ranks of this node, equal on all of them.
        timeout: seconds within which all others of ``near`` must have sent, once all ranks are ready.

    Raises:
        CommError: on all ranks, where it failed on one: a rank could not be reached, did not send in time or
            has died, or the limit of open files was reached. The text names the rank. No descriptor is left.
    """
    if all(address[1] < 0 for address in addresses):
        return list(addresses)
    pids = _processes(addresses, near)
    with _Exchange(pids) as mine:
        if pids:
            mine.attempt(mine.listen)
        places = gather(group, "sockets", mine.place)
        if pids:
            mine.attempt(mine.trade, places, group.rank, addresses[group.rank][1], timeout)
        try:
            told = gather(group, "descriptors", mine.failure)  # no rank closes before all have what they want
        except Exception as error:
            if mine.failure is None:
                raise
            raise _error(group.rank, mine.failure) from error
        failures = [(rank, failure) for rank, failure in enumerate(told) if failure is not None]
        if failures:
            # The first that is not about another rank is the cause of the others.
            raise _error(*min(failures, key=lambda f: (f[1][0], f[0])))
        received = mine.take()
    return [
        (pid, received.get(rank, fd), workers, handle, net)
        for rank, (pid, fd, workers, handle, net) in enumerate(addresses)
    ]


def close_fds(exchanged: list[Address], near: Sequence[int]) -> None:
    """Close the descriptors that :func:`exchange_fds` has put into its result."""
    for rank in _processes(exchanged, near):
        os.close(exchanged[rank][1])


def _processes(addresses: list[Address], near: Sequence[int]) -> dict[int, int]:
    """The processes to exchange descriptors with, by rank."""
    return {r: addresses[r][0] for r in near if addresses[r][0] != os.getpid() and addresses[r][1] >= 0}


Failure = tuple[bool, str]  # whether it is about another rank, which may know better; what happened


def _error(rank: int, failure: Failure) -> CommError:
    about_another, what = failure
    text = f"rank {rank} could not exchange memory with the ranks on its node: {what}"
    return CommError(text, peers=[] if about_another else [rank])


class _AboutAnother(Exception):
    """This rank is well, but another did not do its part."""


class _Exchange:
    """One rank's sockets and what came over them; leaving it closes everything that was not taken.

    Attributes:
        place: a path by which other processes of this host reach this rank's socket; None: they cannot.
        failure: why the exchange has failed here, or None.
    """

    def __init__(self, pids: dict[int, int]) -> None:
        self.place: str | None = None
        self.failure: Failure | None = None
        self._pids = pids  # by rank: the processes to exchange with
        self._received: dict[int, int] = {}  # descriptors by rank
        self._open = ExitStack()

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        for fd in self.take().values():
            os.close(fd)

    def take(self) -> dict[int, int]:
        """What was received, by rank; the caller's from now on."""
        taken, self._received = self._received, {}
        return taken

    def attempt(self, step: Callable[..., None], *args: Any) -> None:
        """Do ``step``, unless one failed before. A failure of this rank is shown to the others at once."""
        if self.failure is not None:
            return
        try:
            step(*args)
        except _AboutAnother as error:
            self.failure = (True, str(error))  # ranks that wait for this one see that other one, too
        except OSError as error:
            self.failure = (False, f"{type(error).__name__}: {error}")
            self._open.close()

    def listen(self) -> None:
        """Open this rank's socket, and set ``place``."""
        directory = self._open.enter_context(tempfile.TemporaryDirectory(prefix="commlib-"))  # mode 0700
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open.callback(os.close, fd)
        self._listener = self._open.enter_context(_new_socket())
        # Through /proc the path is short, however long the directory's, and good in other mount namespaces.
        self._listener.bind(f"/proc/self/fd/{fd}/{_NAME}")
        self._listener.listen(len(self._pids) + 8)  # ranks connect before any accepts
        self.place = f"/proc/{os.getpid()}/fd/{fd}/{_NAME}"

    def trade(self, places: Sequence[str | None], rank: int, fd: int, timeout: float) -> None:
        """Send ``fd`` to all others, and receive theirs, in ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._listener, selectors.EVENT_READ)
            gone = []
            for other in self._pids:
                try:
                    connection = self._connect(other, places[other], deadline)
                    # Not socket.send_fds: in some versions it takes flags and an address and ignores them.
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))
                    connection.sendmsg([str(rank).encode()], [rights])
                    waiting.register(connection, selectors.EVENT_READ, other)
                except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError, FileNotFoundError):
                    gone.append(other)
            self._handle(waiting, gone, 0)
            while missing := sorted(self._pids.keys() - self._received.keys()):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _AboutAnother(f"{self._named(missing)} did not send within {timeout:g} s")
                self._handle(waiting, [], left)

    def _handle(self, waiting: selectors.BaseSelector, gone: list[int], seconds: float) -> None:
        """Wait for something to happen, and deal with it. ``gone``: ranks that left no trace."""
        ready = [key for key, _ in waiting.select(seconds)]
        # Nothing comes back on this rank's own connections but their end, and that only after a failure. If
        # several have ended, the first is not known: a rank that lost its group because of it is gone too.
        gone = sorted(gone + [key.data for key in ready if key.data is not None])
        if gone:
            raise _AboutAnother(f"{self._named(gone)}: died, or gave up")
        for sock in (key.fileobj for key in ready):
            assert isinstance(sock, socket.socket)
            if sock is not self._listener:
                waiting.unregister(sock)
                self._receive(sock)  # and it stays open: its end would mean failure
                continue
            incoming, _ = sock.accept()
            self._open.enter_context(incoming)
            if _is_of(incoming, set(self._pids.values())):
                waiting.register(incoming, selectors.EVENT_READ)
            else:
                incoming.close()  # a stranger

    def _receive(self, incoming: socket.socket) -> None:
        """Take a descriptor from a connection of one of the others' processes."""
        said, fds = _receive_fds(incoming)
        rank = int(said) if said.isdigit() else -1
        expected = rank in self._pids and rank not in self._received and len(fds) == 1
        if expected and _is_of(incoming, {self._pids[rank]}):
            self._received[rank] = fds[0]
            return
        for fd in fds:
            os.close(fd)

    def _connect(self, rank: int, place: str | None, deadline: float) -> socket.socket:
        if place is None:
            raise _AboutAnother(f"{self._named([rank])} could not begin")
        connection = self._open.enter_context(_new_socket())
        while True:
            try:
                connection.connect(place)
                break
            except BlockingIOError:  # its queue is full
                if time.monotonic() >= deadline:
                    raise _AboutAnother(f"{self._named([rank])} let nobody in") from None
                time.sleep(0.01)
            except PermissionError as error:
                raise OSError(f"{self._named([rank])} cannot be reached: {error}. {_ONE_USER}") from None
        if not _is_of(connection, {self._pids[rank]}):
            raise OSError(f"the socket of {self._named([rank])} is of another process or user. {_ONE_USER}")
        return connection

    def _named(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} (process {self._pids[rank]})" for rank in ranks)


def _new_socket() -> socket.socket:
    """A socket on which messages stay whole, and that refuses what it cannot do at once."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)


def _is_of(connection: socket.socket, pids: set[int]) -> bool:
    """Whether the other end is one of these processes, and this user's."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid in pids and uid == os.geteuid()


def _receive_fds(connection: socket.socket) -> tuple[bytes, list[int]]:
    """A message and the descriptors in it.

    Raises:
        OSError: more than one descriptor was sent, or this process has no room for another.
    """
    room = socket.CMSG_LEN(array("i").itemsize)  # of one
    said, ancillary, flags, _ = connection.recvmsg(16, room, socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise OSError(
            "a descriptor came that could not be received. Is the limit of open files reached (ulimit -n)?"
        )
    return said, list(fds)
