"""Groups: which ranks belong together, and how they find each other at start-up.

A group only bootstraps: it gathers a few bytes. Rows never travel through it.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commlib.errors import CommError, PeerTimeout
from commlib.settings import START_SECONDS
from commlib.startup.conversation import NOTHING, Group, PostingGroup, gather
from commlib.startup.launcher import find_launch
from commlib.weak import WeakSet

__all__ = ["Group", "MPIGroup", "SingleGroup", "StoreGroup", "ThreadGroup", "TorchGroup", "resolve_group"]

_MPI_PAUSE = 1e-3  # seconds
_LET_GO, _LET_GO_PAUSE = 1.0, 1e-5  # seconds, see let_go
_MPI_LOOKS = 20  # after which what was sent earlier has arrived: MPI moves a little each time


class SingleGroup(Group):
    """One rank by itself."""

    rank, size = 0, 1

    @property
    def origin(self) -> object:
        return SingleGroup

    def allgather(self, data: bytes) -> list[bytes]:
        return [data]


class StoreGroup(PostingGroup):
    """Ranks that share a ``torch.distributed`` store: what torchrun's environment offers by itself.

    The store itself counts each rank's conversations, so a group may be made anew over it.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        # torchrun's store outlives its workers. Those of the next attempt go on counting, which is right
        # unless some died at start-up: what these posted must not be found. The attempt's number in the
        # prefix sees to it, but with several nodes each counts only the attempts after its own failures.
        one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "any"
        self._store = dist.PrefixStore(f"commlib/{attempt}/{size}", store)
        self._given = store
        self.rank, self.size = rank, size

    @property
    def origin(self) -> object:
        return self._given

    def open(self, seconds: float) -> int:
        with _store_errors():
            return self._store.add(f"conversations/{self.rank}", 1)

    def post(self, key: str, data: bytes) -> None:
        with _store_errors():
            self._store.set(key, data)  # type: ignore[arg-type]  # bytes serve as well

    def find(self, key: str) -> Any:
        with _store_errors():
            return self._store.get(key) if self._store.check([key]) else NOTHING

    def drop(self, keys: Sequence[str]) -> None:
        if keys:
            with _store_errors():
                self._store.delete_key(keys[self.rank])


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CommError(f"the store by which the ranks find each other does not answer: {error}") from error


class TorchGroup(StoreGroup):
    """A ``torch.distributed`` process group, by the store over which its own ranks have met.

    It does not keep the process group: a reference keeps its threads past ``destroy_process_group``, and
    Python cannot exit cleanly under them.

    Attributes:
        mesh: the 1-D DeviceMesh it was given as; None: it was not given as one.
    """

    def __init__(self, group: dist.ProcessGroup | None, mesh: dist.DeviceMesh | None = None) -> None:
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("this process is not a member of the process group")
        known = dist.group.WORLD if group is None else group
        assert known is not None
        self._process_group, self.mesh = weakref.ref(known), mesh
        store = dist.distributed_c10d._get_process_group_store(known)
        super().__init__(store, rank, dist.get_world_size(group))

    @property
    def origin(self) -> object:
        if (known := self._process_group()) is None:
            raise ValueError("group= stands for a torch.distributed process group that has been destroyed")
        return known

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """That group; None: it has been destroyed."""
        known = self._process_group()  # a group that the user keeps may be destroyed
        return known if known in dist.distributed_c10d._world.pg_map else None


class _Letters:
    """What ranks of an MPI communicator write to each other, in a duplicate of it that nothing else uses.

    MPI's own gathers have no deadline, and do not say which ranks are missing.
    """

    def __init__(self, comm: Any) -> None:
        self._comm, self._making = comm.Idup()
        self._sent: list[tuple[Any, bytes]] = []  # what MPI may still read
        self._received: dict[str, bytes] = {}
        self.conversations = 0

    def wait_for_all(self, seconds: float) -> bool:
        """Whether all ranks have joined in making the duplicate."""
        end = time.monotonic() + seconds
        while not self._making.Test():
            if time.monotonic() > end:
                return False
            time.sleep(_MPI_PAUSE)
        return True

    def send(self, key: str, data: bytes) -> None:
        letter = key.encode() + b" " + data
        for rank in range(self._comm.Get_size()):
            self._sent.append((self._comm.Isend(letter, rank), letter))
        self._sent = [(request, letter) for request, letter in self._sent if not request.Test()]

    def receive(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        while (message := self._comm.Improbe(status=status)) is not None:
            letter = bytearray(status.Get_count(MPI.BYTE))
            message.Recv(letter)
            name, _, data = bytes(letter).partition(b" ")
            self._received[name.decode()] = data

    def find(self, key: str) -> Any:
        self.receive()
        return self._received.get(key, NOTHING)

    def drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._received.pop(key, None)


@cache
def _letters_key() -> int:
    """The key under which a communicator keeps its letters."""
    from mpi4py import MPI

    return MPI.Comm.Create_keyval()


class MPIGroup(PostingGroup):
    """An mpi4py communicator."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()

    @property
    def _letters(self) -> _Letters:
        letters = self._comm.Get_attr(_letters_key())
        if letters is None:
            letters = _Letters(self._comm)
            self._comm.Set_attr(_letters_key(), letters)
        return letters

    @property
    def origin(self) -> object:
        return self._letters

    def barrier(self) -> None:
        """Return when every rank has called it: by MPI, which lets all go at nearly the same moment.

        Raises:
            PeerTimeout: a rank did not come within 300 s.
        """
        request, end = self._comm.Ibarrier(), time.monotonic() + START_SECONDS
        while not request.Test():
            if time.monotonic() > end:
                raise self._timeout(START_SECONDS)
            time.sleep(0)

    def open(self, seconds: float) -> int:
        if not self._letters.wait_for_all(seconds):
            raise self._timeout(seconds)
        for _ in range(_MPI_LOOKS):
            self._letters.receive()
        self._letters.conversations += 1
        return self._letters.conversations

    def _timeout(self, seconds: float) -> PeerTimeout:
        """MPI does not say which ranks are missing."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        named = ", ".join(map(str, others))
        text = f"one or more of ranks {named} of the MPI communicator did not come within {seconds:.3g} s"
        return PeerTimeout(text, self.rank, others, "start-up", "communicator", 0)

    def post(self, key: str, data: bytes) -> None:
        self._letters.send(key, data)

    def find(self, key: str) -> Any:
        return self._letters.find(key)

    def drop(self, keys: Sequence[str]) -> None:
        self._letters.drop(keys)


class _Board:
    """Where the threads of one world post. What is posted there need not be bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.changes = 0
        self.posts: dict[str, Any] = {}
        self.gone: dict[int, str] = {}  # why, by rank

    def change(self, notes: dict[Any, Any], key: Any, what: Any) -> None:
        """Add to one of its dictionaries, and notify all that wait."""
        with self.changed:
            notes[key] = what
            self.changes += 1
            self.changed.notify_all()


class ThreadGroup(PostingGroup):
    """One rank of several that are threads of this process; made by :func:`commlib.run_ranks`.

    It gathers any objects of the process, not only bytes.
    """

    def __init__(self, board: _Board, rank: int, device: str, run_ahead: bool) -> None:
        self._board = board
        self._conversations = 0
        self._seen = threading.local()  # changes of the board: communicators may grow in several threads
        self.run_ahead = run_ahead  # see run_ranks
        self.rank, self.size, self.device = rank, board.size, device
        self.communicators: WeakSet[Any] = WeakSet()  # of this rank

    @staticmethod
    def world(size: int, device: str = "cpu", run_ahead: bool = False) -> list[ThreadGroup]:
        """The groups of ``size`` in-process ranks, one for each thread."""
        board = _Board(size)
        return [ThreadGroup(board, r, device, run_ahead) for r in range(size)]

    def open(self, seconds: float) -> int:
        self._conversations += 1
        return self._conversations

    def post(self, key: str, data: bytes) -> None:
        self._board.change(self._board.posts, key, data)

    def find(self, key: str) -> Any:
        return self._board.posts.get(key, NOTHING)

    def pause(self, waited: float, left: float) -> None:
        board = self._board
        with board.changed:
            seen = getattr(self._seen, "changes", -1)
            board.changed.wait_for(lambda: board.changes != seen, left)
            self._seen.changes = board.changes

    def drop(self, keys: Sequence[str]) -> None:
        if keys:
            del self._board.posts[keys[self.rank]]

    def why_gone(self, ranks: Iterable[int]) -> tuple[int, str] | None:
        gone = self._board.gone
        return next(((rank, gone[rank]) for rank in (self.rank, *ranks) if rank in gone), None)

    def leave(self, why: str) -> None:
        """This rank joins no further gather: let the others' waits for it fail at once."""
        self._board.change(self._board.gone, self.rank, why)

    def abort(self, why: str) -> None:
        """This rank failed: let the others' waits for it fail at once, in operations too."""
        self.leave(why)
        for communicator in self.communicators:
            communicator.core.give_up(why)


_current = threading.local()


def set_current_group(group: ThreadGroup | None) -> None:
    """Make ``group`` the default group of this thread."""
    _current.group = group


def in_process_group() -> ThreadGroup | None:
    """The default group of this thread, inside :func:`commlib.run_ranks`."""
    return getattr(_current, "group", None)


def resolve_group(group: Any = None, seconds: float = START_SECONDS) -> Group:
    """The Group for what a user passes as ``group``.

    Args:
        group: a Group, a torch.distributed ProcessGroup or 1-D DeviceMesh, or an mpi4py communicator.
            None: the in-process rank of this thread, else torch.distributed's default group, else the ranks
            that the innermost launcher started (see :mod:`commlib.startup.launcher`), else one rank.
        seconds: to reach the store that torchrun's environment names.

    Raises:
        TypeError: the group is none of these.
        ValueError: a DeviceMesh with more than one dimension, or a group with wrong numbers.
        CommError: launchers contradict each other, or the ranks of one cannot be reached.
    """
    if group is None:
        return _default_group(seconds)
    if isinstance(group, Group):
        _check_numbers(group)
        return group
    if isinstance(group, dist.ProcessGroup):
        return TorchGroup(group)
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"a DeviceMesh must have one dimension, got {group.ndim}: slice it")
        return TorchGroup(group.get_group(), group)
    if hasattr(group, "Get_rank") and hasattr(group, "allgather"):
        return MPIGroup(group)
    raise TypeError(
        "group must be a commlib.Group, a torch.distributed ProcessGroup or DeviceMesh, or an mpi4py "
        f"communicator, got {type(group).__name__}"
    )


def process_group_of(group: Group) -> dist.ProcessGroup | None:
    """torch.distributed's group of the same ranks; None: none exists, or none that we can know of."""
    if isinstance(group, TorchGroup):
        return group.process_group
    here = (group.rank, group.size)
    if dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) == here:
        return dist.group.WORLD
    return None


def gather_numbers(group: Group, numbers: Tensor) -> Tensor:
    """``[n]`` of each rank, as ``[ranks, n]`` on every rank. All ranks call it; for a few numbers, not rows.

    Over torch.distributed where it knows the ranks; the host waits only where its backend needs that.

    Raises:
        PeerTimeout: a rank did not come within 300 s (without torch.distributed, which has its own timeout).
    """
    process_group = process_group_of(group)
    if process_group is None:
        rows = gather(group, "gather of numbers", numbers.tolist())
        return torch.tensor(rows, dtype=numbers.dtype, device=numbers.device)
    return gather_in(process_group, numbers)


def gather_in(process_group: dist.ProcessGroup, numbers: Tensor) -> Tensor:
    """As gather_numbers, over torch.distributed's group."""
    by_gloo = f"{numbers.device.type}:gloo" in dist.get_backend_config(process_group)
    sent = numbers.cpu() if by_gloo else numbers.contiguous()
    gathered = sent.new_empty(dist.get_world_size(process_group), sent.numel())
    rows = list(gathered.unbind())
    with let_go(sent, *rows):
        dist.all_gather(rows, sent, group=process_group)
    return gathered.to(numbers.device)


@contextlib.contextmanager
def let_go(*tensors: Tensor) -> Iterator[None]:
    """End a collective of torch.distributed on these tensors when its backend's threads hold them no more.

    gloo's drop a tensor some time after the operation, and need Python's lock for one that Python knows. If
    the process group goes at that moment, because DDP or the program ends, PyTorch 2.13 joins the thread
    with the lock held: a deadlock, or an abort at exit.

    Raises:
        RuntimeError: see :func:`refuse_in_child`.
    """
    refuse_in_child()
    counts = [_uses(t) for t in tensors]
    yield
    end = time.monotonic() + _LET_GO
    while any(_uses(t) > n for t, n in zip(tensors, counts, strict=True)) and time.monotonic() < end:
        time.sleep(_LET_GO_PAUSE)


# The default process group of the process that forked this one.
_inherited: list[weakref.ref[dist.ProcessGroup]] = []


def _note_inherited() -> None:
    known = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    _inherited[:] = [] if known is None else [weakref.ref(known)]


os.register_at_fork(after_in_child=_note_inherited)


def refuse_in_child() -> None:
    """Raise RuntimeError where torch.distributed's groups are those of the process that forked this one.

    Their threads do not exist here: a collective would wait for ever, past its own timeout.
    """
    if _inherited and dist.group.WORLD is _inherited[0]():
        raise RuntimeError(
            "this process was forked from a rank, whose process groups it cannot use: gather, average and "
            "clip in the rank itself, or start the process by spawn"
        )


def _uses(tensor: Any) -> int:
    return tensor._use_count() if hasattr(tensor, "_use_count") else 0


def _check_numbers(group: Group) -> None:
    rank, size = getattr(group, "rank", None), getattr(group, "size", None)
    try:
        right = 0 <= operator.index(rank) < operator.index(size)  # type: ignore[arg-type]
    except TypeError:
        right = False
    if not right:
        raise ValueError(
            f"a Group needs integers 0 <= rank < size, {type(group).__name__} has {rank!r}, {size!r}"
        )


def _default_group(seconds: float) -> Group:
    in_process = in_process_group()
    if in_process is not None:
        return in_process
    if dist.is_available() and dist.is_initialized():
        return TorchGroup(None)
    launch = find_launch()
    if launch is None:
        return SingleGroup()
    if launch.by == "torchrun":
        return StoreGroup(_environment_store(launch.rank, launch.size, seconds), launch.rank, launch.size)
    from mpi4py import MPI

    return MPIGroup(MPI.COMM_WORLD)


# By address: rank 0 may have to serve its store for as long as the process lives. A child has its own.
_stores: dict[tuple[int, str, str], dist.Store] = {}


def _environment_store(rank: int, size: int, seconds: float) -> dist.Store:
    """The store that torchrun's variables name. Waits only for the process that serves it."""
    place = os.getpid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    _, host, port = place
    if place not in _stores:
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
        try:
            _stores[place] = dist.TCPStore(
                host,
                int(port),
                size,
                is_master=rank == 0 and not served,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,  # init_process_group may open it again
            )
        except (RuntimeError, ValueError) as error:
            who = "torchrun" if served else "rank 0"
            raise CommError(
                f"the store that {who} serves for start-up, at {host}:{port} (MASTER_ADDR, MASTER_PORT), "
                f"could not be reached or opened within {seconds:g} s: {error}"
            ) from None
    return _stores[place]
